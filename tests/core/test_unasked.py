"""Pages that are put on offer before the decode worker asks for them."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import msgspec
import pytest

from pshare_jax.core import messages as m
from pshare_jax.core import unasked
from pshare_jax.core.decode import DecodeCore
from pshare_jax.core.messages import DISPATCHER, Message
from pshare_jax.core.plans import DecodePlan
from pshare_jax.core.prefill_task import PrefillTask
from pshare_jax.core.unasked import Unasked
from tests.core.reply import Reply
from tests.core.scripted import Host
from tests.core.sequences import make_sequence
from tests.core.setting import Setting

CONTEXT = list(range(1, 23))
"""21 tokens that the prefill module covers: 5 full pages, and one that is not full."""

SETTING = Setting(prefill_pages=60, decode_pages=60, unasked=True)


class Watched(Host):
    """A host that writes down what parts say to each other."""

    def __init__(self, setting: Setting = SETTING):
        self.said: list[Message] = []
        super().__init__(setting)
        self.given_up: list[int] = []
        for worker in self.decode.values():
            self._watch(worker.core)

    def _watch(self, core: DecodeCore) -> None:
        """Writes down what the executor is told to give up."""
        plan = core._plan

        def watched(*arguments: Any, **named: Any) -> DecodePlan:
            made = plan(*arguments, **named)
            self.given_up += made.cancelled
            return made

        core._plan = watched

    def _receive(self, to: str, message: Message) -> None:
        self.said.append(message)
        super()._receive(to, message)

    def asked(self, *prompts: list[int], model: str = "lora") -> list[Reply]:
        """Replies to prompts that come at once; and `said` begins anew."""
        self.said.clear()
        replies = [self.submit(model, prompt) for prompt in prompts]
        self.drain()
        assert [reply.tokens for reply in replies] == [reply.expected for reply in replies]
        return replies

    @property
    def kinds(self) -> Counter[str]:
        return Counter(type(message).__name__ for message in self.said)

    @property
    def offered(self) -> list[int]:
        """Pages of each offer that came with the news that a prompt is covered."""
        covered = [one.offer for one in self.said if isinstance(one, m.Covered)]
        return [0 if offer is None else len(offer.descriptors) for offer in covered]

    @property
    def transfers(self) -> list[int]:
        """Of these offers."""
        covered = [one.offer for one in self.said if isinstance(one, m.Covered)]
        return [offer.transfer for offer in covered if offer is not None]


def test_who_has_asked_once_need_not_ask_again() -> None:
    """Nothing is offered to a worker of which it is not known how it reads."""
    host = Watched()
    host.asked(CONTEXT)
    assert (host.offered, host.kinds["Fetch"]) == ([0], 1)
    host.asked([9, *CONTEXT])
    assert (host.offered, host.kinds["Fetch"], host.kinds["Offered"]) == ([6], 0, 0)
    assert host.decode["decode0"].core.stats.failed_transfers == 0


def test_what_the_decode_worker_has_is_not_offered() -> None:
    host = Watched()
    host.asked(CONTEXT)
    host.asked([*CONTEXT, *range(40, 46)])
    # 27 tokens are covered; the first five pages are there already.
    assert (host.offered, host.kinds["Fetch"]) == ([2], 0)


def test_what_it_has_lost_it_asks_for() -> None:
    """The router thinks that it is there."""
    host = Watched()
    host.asked(CONTEXT)
    cache = host.decode["decode0"].core.cache
    fresh = cache.allocate(cache.num_available)
    assert fresh is not None
    cache.release(fresh)
    host.said.clear()
    reply = host.submit("lora", [*CONTEXT, 40, 41])
    # It hears that its pages have left the index when it next has something to say.
    host.drain()
    assert reply.tokens == reply.expected
    assert (host.offered, host.kinds["Fetch"]) == ([1], 1)
    assert host.given_up == host.transfers, "it may have begun to be read"


def test_what_it_has_got_meanwhile_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """More is on offer than it lacks: the rest goes nowhere."""
    monkeypatch.setattr(unasked, "MAX_KEYS", 0)
    host = Watched()
    host.asked([7, 7, 7])
    # Two models, one after the other covered, before anything is told to the router.
    replies = [host.submit(model, CONTEXT) for model in ("lora", "identity")]
    host.drain()
    assert [reply.tokens for reply in replies] == [reply.expected for reply in replies]
    assert host.offered == [0, 6, 6]
    assert host.kinds["Fetch"] == 1, "of the first prompt of all"
    assert host.decode["decode0"].core.stats.handoff_pages.total() == 1 + 6 + 1


def test_a_context_that_goes_there_already_is_not_offered_twice() -> None:
    host = Watched()
    host.asked([7, 7, 7])
    host.said.clear()
    replies = [host.submit(model, CONTEXT) for model in ("lora", "identity", "lora")]
    host.drain()
    assert [reply.tokens for reply in replies] == [reply.expected for reply in replies]
    assert host.offered == [6, 1, 1]


def test_who_has_no_room_asks_when_he_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more than a few offers wait for that."""
    monkeypatch.setattr(unasked, "MAX_OFFERS", 2)
    host = Watched(Setting(prefill_pages=80, decode_pages=80, max_num_seqs=1, unasked=True))
    host.asked([7, 7, 7])
    host.said.clear()
    replies = [host.submit("lora", [number, *CONTEXT]) for number in range(30, 35)]
    for _ in range(40):
        host.deliver_all()
        host.work("prefill0")
    assert host.offered == [6, 6, 0, 0, 0]
    assert host.kinds["Fetch"] == 0
    host.work("decode0")
    assert host.given_up == host.transfers[1:], "who waits has what was read forgotten"
    host.drain()
    assert [reply.tokens for reply in replies] == [reply.expected for reply in replies]
    assert host.kinds["Fetch"] == 4, "all but the one that had room at once"
    assert host.link.offers == {}


def test_those_of_one_decode_worker_take_no_others_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unasked, "MAX_OFFERS", 2)
    book = Unasked(itertools.count())
    for worker in ("decode0", "decode1"):
        book.heard_of(worker, "how")

    def offered(id: int, worker: str) -> bool:
        sequence = make_sequence(id, [id, *CONTEXT], page_size=4)
        sequence = msgspec.structs.replace(sequence, decode_worker=worker)
        task = PrefillTask(sequence, list(range(1, 7)))
        return book.offer(task, m.Covered(task.sequence, task.usage()), 4) is not None

    assert [offered(id, "decode0") for id in range(3)] == [True, True, False]
    assert [offered(id, "decode1") for id in range(3, 6)] == [True, True, False]
    assert book.forget(0) == [0]
    assert [offered(6, "decode1"), offered(7, "decode0")] == [False, True]


def test_what_comes_too_late_is_given_up() -> None:
    """Pages that were asked for are on offer when nobody waits for them any more."""
    host = Watched()
    host.decode["decode0"].core.receive(m.Offered(77, [], "somewhere"))
    host.work("decode0")
    assert host.given_up == [77]
    prefill = host.prefill["prefill0"].core
    prefill.receive(m.Offered(78, [], "somewhere"))
    plan = prefill.schedule()
    assert plan is not None
    assert plan.cancelled == [78]


@pytest.mark.parametrize("fault", ["refused", "lost"])
def test_an_offer_that_cannot_be_made_is_asked_for(fault: str) -> None:
    host = Watched()
    host.asked([7, 7, 7])
    host.link.offer_faults.append(fault)
    host.asked(CONTEXT)
    assert host.kinds["Fetch"] == 1
    assert host.offered == [0 if fault == "refused" else 6]


@pytest.mark.parametrize("fault", ["refused", "corrupt"])
def test_one_that_cannot_be_read_is_asked_for_once_more(fault: str) -> None:
    host = Watched()
    host.asked([7, 7, 7])
    host.link.accept_faults.append(fault)
    host.asked(CONTEXT)
    assert (host.offered, host.kinds["Fetch"]) == ([6], 1)
    assert host.decode["decode0"].core.stats.failed_transfers == 1


@pytest.mark.parametrize("dies", [False, True])
def test_a_request_ends_between_its_last_chunk_and_its_offer(dies: bool) -> None:
    """Its decode worker has heard nothing of it, and will not; all is given back."""
    setting = Setting(prefill_pages=60, decode=2, decode_pages=60, unasked=True)
    host = Watched(setting if dies else SETTING)
    for prompt in ([7, 7, 7], [8, 8, 8, 8], [9, 9]):
        host.asked(prompt)
    core = host.prefill["prefill0"].core
    reply = host.submit("lora", CONTEXT)
    host.deliver_all()
    while not core.held:
        host.work("prefill0")
    (task,) = core.held.tasks()
    assert core.held.is_untold(task.sequence.id)
    to = task.sequence.decode_worker
    if dies:
        host.kill(to)
    else:
        host.abort(reply)
    host.deliver_all(DISPATCHER, "prefill0", to)
    assert not core.held
    host.drain()
    assert reply.tokens == (reply.expected if dies else [])


def test_the_books_are_empty_afterwards() -> None:
    host = Watched()
    for number in range(4):
        host.asked([number, *CONTEXT], [*CONTEXT, number])
    held = host.prefill["prefill0"].core.held
    assert held.unasked is not None
    books = [held.unasked._covered, held.unasked._untold]
    assert not any([*books, held._offer_of, held._offers])
