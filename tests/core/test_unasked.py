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
from pshare_jax.core.requests import Owner
from pshare_jax.core.stats import PrefillStats
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
    def counted(self) -> dict[str, int]:
        """What is shown of offers that nobody had asked for."""
        made = self.prefill["prefill0"].core.stats.unasked
        used = self.decode["decode0"].core.stats.used_offers
        return {
            **{outcome: made["decode0", outcome] for outcome in ("made", "crowded")},
            "used": used,
        }

    def covered(self) -> None:
        """Prompts are covered; the decode worker does nothing meanwhile."""
        for _ in range(40):
            self.deliver_all()
            self.work("prefill0")

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
    assert host.counted == {"made": 1, "crowded": 0, "used": 1}
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
    assert host.counted == {"made": 1, "crowded": 0, "used": 0}


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
    host.covered()
    assert host.offered == [6, 6, 0, 0, 0]
    assert host.kinds["Fetch"] == 0
    host.work("decode0")
    assert host.given_up == host.transfers[1:], "who waits has what was read forgotten"
    host.drain()
    assert [reply.tokens for reply in replies] == [reply.expected for reply in replies]
    assert host.kinds["Fetch"] == 4, "all but the one that had room at once"
    assert host.link.offers == {}
    assert host.counted == {"made": 2, "crowded": 3, "used": 1}


def test_the_next_is_offered_again_with_the_first_that_gets_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though two that were never offered wait before it."""
    monkeypatch.setattr(unasked, "MAX_ALIKE", 2)
    host = Watched(Setting(prefill_pages=80, decode_pages=80, max_num_seqs=1, unasked=True))
    host.asked([7, 7, 7])
    host.said.clear()
    replies = [host.submit("lora", [30, *CONTEXT], 40)]
    host.covered()
    while not replies[0].tokens:
        host.round()
    replies += [host.submit("lora", [number, *CONTEXT]) for number in range(31, 35)]
    host.covered()
    assert host.offered == [6, 6, 6, 0, 0]
    host.abort(replies[1])
    replies.append(host.submit("lora", [35, *CONTEXT]))
    host.covered()
    assert host.offered == [6, 6, 6, 0, 0, 6]
    while not replies[2].tokens:
        host.round()
    replies.append(host.submit("lora", [36, *CONTEXT]))
    host.covered()
    assert host.offered == [6, 6, 6, 0, 0, 6, 6]
    host.drain()
    assert [reply.tokens for reply in replies[2:]] == [reply.expected for reply in replies[2:]]
    assert host.asked([37, *CONTEXT])
    assert (host.offered, host.kinds["Fetch"]) == ([6], 0), "nobody waits any more"
    assert host.counted == {"made": 6, "crowded": 2, "used": 2}


def test_a_flood_that_waits_does_not_keep_another_client_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That gets a slot of the flood's at once, and asks for nothing."""
    monkeypatch.setattr(unasked, "MAX_ALIKE", 2)
    host = Watched(Setting(prefill_pages=80, decode_pages=99, max_num_seqs=2, unasked=True))
    host.asked([7, 7, 7])
    flood = [host.submit("lora", [n, *CONTEXT], 40, owner=Owner("a")) for n in (30, 31)]
    while not all(reply.tokens for reply in flood):
        host.round()
    flood += [host.submit("lora", [n, *CONTEXT], owner=Owner("a")) for n in (32, 33, 34)]
    host.covered()
    host.work("decode0")
    host.said.clear()
    other = host.submit("lora", [35, *CONTEXT], 1, owner=Owner("b"))
    while not other.tokens:
        host.round()
    first = next(one for one in host.said if isinstance(one, m.Covered))
    assert (first.sequence.owner.key, len(first.offer.descriptors if first.offer else ())) == (
        "b",
        6,
    )
    assert first.sequence.id not in [one.id for one in host.said if isinstance(one, m.Fetch)]
    assert host.counted == {"made": 5, "crowded": 2, "used": 3}, "who gave way has come again"
    host.drain()
    assert [reply.tokens for reply in flood] == [reply.expected for reply in flood]


def book_of(*workers: str) -> tuple[Unasked, PrefillStats]:
    stats = PrefillStats()
    book = Unasked(itertools.count(), stats)
    for worker in workers:
        book.heard_of(worker, "how")
    return book, stats


def is_offered(
    book: Unasked, id: int, worker: str = "decode0", model: str = "lora", client: str = ""
) -> bool:
    sequence = make_sequence(id, [id, *CONTEXT], page_size=4, model=model)
    sequence = msgspec.structs.replace(sequence, decode_worker=worker, owner=Owner(client))
    task = PrefillTask(sequence, list(range(1, 7)))
    return book.offer(task, m.Covered(task.sequence, task.usage()), 4) is not None


def test_those_of_one_decode_worker_take_no_others_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unasked, "MAX_OFFERS", 2)
    book, stats = book_of("decode0", "decode1")
    assert [is_offered(book, id) for id in range(3)] == [True, True, False]
    assert [is_offered(book, id, "decode1") for id in range(3, 6)] == [True, True, False]
    assert book.forget(0) == [0]
    assert [is_offered(book, 6, "decode1"), is_offered(book, 7)] == [False, True]
    assert stats.unasked == {("decode0", "crowded"): 1, ("decode1", "crowded"): 2}


def test_those_of_one_model_leave_some_to_others() -> None:
    book, stats = book_of("decode0")
    offered = [
        [is_offered(book, 20 * number + id, model=model) for id in range(9)].count(True)
        for number, model in enumerate(("lora", "identity", "full"))
    ]
    assert offered == [8, 4, 0]
    assert stats.unasked == {("decode0", "crowded"): 1 + 5 + 9}
    book.forget(0)
    assert [is_offered(book, 90, model="full"), is_offered(book, 91)] == [True, False]


def test_a_client_leaves_some_to_others_whatever_its_models() -> None:
    book, _ = book_of("decode0")
    for id in range(12):
        assert is_offered(book, id, model=("lora", "full")[id % 2], client="first")
    assert not is_offered(book, 12, model="identity", client="first")
    assert [is_offered(book, id, client="second") for id in (13, 14)] == [True, False]
    book.forget(0)
    book.forget(1)
    assert [is_offered(book, id, client="second") for id in (15, 16)] == [True, False]


def test_one_that_cannot_be_made_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unasked, "MAX_ALIKE", 1)
    book, stats = book_of("decode0")
    assert is_offered(book, 0)
    told = book.told(0, m.NotOffered(0, "no room", 0))
    assert (told is not None and told.offer, book.told(0, m.NotOffered(0, "no room", 0))) == (
        None,
    ) * 2
    assert is_offered(book, 1)
    assert book.told(1, m.Offered(1, [], "here", 1)) is not None
    assert not is_offered(book, 2)
    assert stats.unasked == {("decode0", "made"): 1, ("decode0", "crowded"): 1}


def test_after_a_question_nothing_is_thought_to_be_there() -> None:
    """The decode worker has lost what went there, or it would not ask."""
    book, _ = book_of("decode0")
    first, again, longer = (
        PrefillTask(make_sequence(id, [*CONTEXT, *rest], page_size=4), list(range(1, 9)))
        for id, rest in enumerate(([], [], [40, 41, 42, 43]))
    )

    def pages(task: PrefillTask) -> int:
        offer = book.offer(task, m.Covered(task.sequence, task.usage()), 4)
        return 0 if offer is None else len(offer.pages)

    assert [pages(first), pages(again)] == [6, 1]
    assert pages(longer) == 2
    book.asked("decode0")
    assert [pages(again), pages(longer)] == [6, 2]


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
