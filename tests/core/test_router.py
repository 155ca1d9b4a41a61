from __future__ import annotations

import itertools

import pytest

from pshare_jax.config import RoutingPolicy
from pshare_jax.core.messages import IndexChanged
from pshare_jax.core.router import NoWorkerError, Router, WorkerInfo
from pshare_jax.core.sequences import Sequence
from pshare_jax.core.sessions import SessionKey
from tests.core.sequences import make_sequence

PAGE, NUM_PAGES = 2, 200
BOTH = ("decode0", "decode1")


class Fleet:
    """A router, and the workers it hears of: two prefill and two decode workers if not told else.

    Args:
        prefill: how many prefill workers there are.
        pairs: whether each of them shares its pool with the decode worker of its number.
    """

    def __init__(self, prefill: int = 2, *, pairs: bool = False, policy: RoutingPolicy = "prefix"):
        self.router = Router(
            [
                WorkerInfo(f"prefill{i}", NUM_PAGES, PAGE, f"decode{i}" if pairs else "")
                for i in range(prefill)
            ],
            [WorkerInfo(name, NUM_PAGES, PAGE) for name in BOTH],
            policy,
        )
        self.waiting: list[Sequence] = []
        self._ids = itertools.count()

    def send(
        self,
        prompt: list[int],
        *,
        hosts: tuple[str, ...] = BOTH,
        session: SessionKey | None = None,
        next_hosts: dict[str, int] | None = None,
    ) -> Sequence:
        """A new sequence, routed; its tokens are pending until `work_off`."""
        sequence = make_sequence(next(self._ids), prompt, page_size=PAGE)
        self.waiting.append(self.router.route(sequence, hosts, session, next_hosts))
        return self.waiting[-1]

    def work_off(self) -> None:
        """The prefill workers have computed everything, and say so."""
        for sequence in self.waiting:
            self.router.pending(sequence.prefill_worker, sequence.id, 0)
        self.waiting.clear()


def other(worker: str) -> str:
    return f"{worker[:-1]}{1 - int(worker[-1])}"


def test_new_sessions_spread() -> None:
    fleet = Fleet()
    workers = [fleet.send([i] * 20).prefill_worker for i in range(6)]
    assert sorted(workers) == ["prefill0"] * 3 + ["prefill1"] * 3
    fleet.work_off()
    # Idle again, and all the same: the one that was sent less.
    assert fleet.send([7] * 40).prefill_worker != fleet.send([8] * 20).prefill_worker


@pytest.mark.parametrize("length", [3, 4, 5, 20, 21])
def test_a_fan_out_goes_to_one_worker(length: int) -> None:
    """Several models asked at once about one prompt, before any of it is computed."""
    fleet = Fleet()
    fleet.send([9] * 3)
    sent = [fleet.send(list(range(length))) for _ in range(8)]
    assert len({sequence.prefill_worker for sequence in sent}) == 1
    assert [sequence.num_uncached for sequence in sent] == [length - 1] + [0] * 7


def test_among_equals_a_prompt_goes_where_most_of_it_is() -> None:
    """A module whose tail is longer asks about the same prompt: its last page is another one, so
    that by what is known it would cost as much where nothing of the prompt is."""
    fleet = Fleet()
    first = fleet.send([1, 2, 3, 4, 5])
    sequence = make_sequence(99, [1, 2, 3, 4, 5], page_size=PAGE, tail=2)
    routed = fleet.router.route(sequence, BOTH)
    assert (first.num_uncached, routed.num_uncached) == (4, 1)
    assert routed.prefill_worker == first.prefill_worker


def test_a_session_stays_until_its_worker_is_overloaded() -> None:
    fleet = Fleet()
    context = list(range(40))
    first = fleet.send(context)
    home = first.prefill_worker
    for turn in range(4):
        fleet.work_off()
        context += [turn] * 6
        # The other one is idle, this one has other things to do: less than the context is worth.
        fleet.router.pending(home, first.id, 60)
        assert fleet.send(context).prefill_worker == home
    fleet.work_off()
    fleet.router.pending(home, first.id, 200)
    assert fleet.send(context).prefill_worker == other(home)
    # It has the context as well now.
    fleet.work_off()
    fleet.router.pending(home, first.id, 30)
    assert fleet.send(context).prefill_worker == other(home)


def test_pages_that_are_held_count_though_nothing_was_sent() -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7]
    probe = Fleet().send(prompt)
    fleet = Fleet()
    away = other(probe.prefill_worker)
    fleet.router.index_changed(away, IndexChanged(probe.keys, []))
    sequence = fleet.send(prompt)
    assert (sequence.prefill_worker, sequence.num_uncached) == (away, 0)


def test_pages_count_up_to_the_first_that_has_left() -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7]
    keys = Fleet().send(prompt).keys
    for removed, uncached in [(2, 2), (1, 4), (0, 6)]:
        fleet = Fleet(prefill=1)
        fleet.router.index_changed("prefill0", IndexChanged(keys, []))
        fleet.router.index_changed("prefill0", IndexChanged([], [keys[removed]]))
        assert fleet.send(prompt).num_uncached == uncached
    fleet = Fleet(prefill=1)
    fleet.router.index_changed("prefill0", IndexChanged(keys, keys))
    assert fleet.send(prompt).num_uncached == 6, "they have entered and then left"


def test_what_was_sent_long_ago_is_forgotten() -> None:
    fleet = Fleet(prefill=1)
    fleet.send([1] * 21)
    assert fleet.send([1] * 21).num_uncached == 0
    for i in range(2, 30):
        fleet.send([i] * 21)
    assert len(fleet.router._prefill["prefill0"].sent) == NUM_PAGES
    assert fleet.send([1] * 21).num_uncached == 20


def test_decode_load_counts_what_is_on_its_way() -> None:
    """A burst is spread before anything of it has arrived."""
    fleet = Fleet()
    sent = [fleet.send([i] * 10) for i in range(6)]
    assert sorted(s.decode_worker for s in sent) == ["decode0"] * 3 + ["decode1"] * 3
    for sequence in sent:
        if sequence.decode_worker == "decode1":
            fleet.router.forget(sequence.id)
            fleet.router.forget(sequence.id)
    assert [fleet.send([9] * 10).decode_worker for _ in range(3)] == ["decode1"] * 3


def test_decode_prefers_the_pool_that_has_the_prompt() -> None:
    probe = Fleet().send([1] * 9)
    fleet = Fleet()
    fleet.router.index_changed("decode1", IndexChanged(probe.keys, []))
    assert fleet.send([1] * 9).decode_worker == "decode1"
    assert fleet.send([2] * 9).decode_worker == "decode0"


def test_a_model_decodes_where_it_is_hosted() -> None:
    fleet = Fleet()
    workers = {fleet.send([i] * 9, hosts=("decode1",)).decode_worker for i in range(4)}
    assert workers == {"decode1"}


def test_routing_again_leaves_the_old_worker() -> None:
    """Each attempt has an id of its own; the one before it is forgotten first."""
    fleet = Fleet()
    sequence = fleet.send([1] * 10)
    first = sequence.decode_worker
    for _ in range(3):
        fleet.router.forget(sequence.id)
        sequence = fleet.send([1] * 10)
        assert sequence.decode_worker == first
    assert {n: w.load for n, w in fleet.router._decode.items()} == {first: 5, other(first): 0}
    # What the first attempt had computed, or would have, is not computed again.
    assert sequence.num_uncached == 0
    assert fleet.router._prefill[sequence.prefill_worker].pending_tokens == 0


def test_what_is_said_of_a_sequence_that_has_ended_is_ignored() -> None:
    fleet = Fleet()
    sequence = fleet.send([1] * 20)
    fleet.router.forget(sequence.id)
    fleet.router.pending(sequence.prefill_worker, sequence.id, 1000)
    fleet.router.pending("prefill7", sequence.id, 1000)
    assert [worker.pending_tokens for worker in fleet.router._prefill.values()] == [0, 0]
    assert fleet.send([1] * 22).prefill_worker == sequence.prefill_worker


def test_pending_tokens_are_those_that_were_said_last() -> None:
    fleet = Fleet(prefill=1)
    one, two = fleet.send([1] * 20), fleet.send([2] * 30)
    worker = fleet.router._prefill["prefill0"]
    assert worker.pending_tokens == 19 + 29
    fleet.router.pending("prefill0", one.id, 11)
    fleet.router.pending("prefill0", one.id, 3)
    assert worker.pending_tokens == 3 + 29
    fleet.router.forget(two.id)
    assert worker.pending_tokens == 3


def test_a_lost_worker_is_never_chosen() -> None:
    fleet = Fleet()
    context = list(range(40))
    sent = fleet.send(context)
    for lost in (sent.prefill_worker, sent.decode_worker):
        fleet.router.lose(lost)
        fleet.router.lose(lost)
    # Not even by its session, nor by what it still says.
    fleet.router.index_changed(sent.prefill_worker, IndexChanged(sent.keys, []))
    fleet.router.pending(sent.prefill_worker, sent.id, 5)
    fleet.router.forget(sent.id)
    again = [fleet.send(context), *(fleet.send([i] * 10) for i in range(4))]
    assert {s.prefill_worker for s in again} == {other(sent.prefill_worker)}
    assert {s.decode_worker for s in again} == {other(sent.decode_worker)}
    assert again[0].num_uncached == 39


def test_without_a_worker_that_could_do_it_the_error_says_which_was_asked_for() -> None:
    fleet = Fleet()
    fleet.router.lose("decode1")
    with pytest.raises(NoWorkerError, match=r"^no decode worker of model lora is alive$"):
        fleet.send([1] * 9, hosts=("decode1",))
    fleet.send([1] * 9)
    for name in ("prefill0", "prefill1"):
        fleet.router.lose(name)
    with pytest.raises(NoWorkerError, match=r"^no prefill worker is alive$"):
        fleet.send([1] * 9)
    # What could not be routed burdens nobody.
    assert list(fleet.router._assigned) == [1]
    assert fleet.router._decode["decode0"].load == 5


def test_where_a_pool_is_shared_the_partner_generates() -> None:
    fleet = Fleet(pairs=True)
    sent = [fleet.send([i] * 20) for i in range(6)]
    pairs = [(s.prefill_worker, s.decode_worker) for s in sent]
    assert sorted(pairs) == [("prefill0", "decode0")] * 3 + [("prefill1", "decode1")] * 3
    fleet.work_off()
    # A session stays with its pool though the other one decodes less.
    for sequence in sent:
        if sequence.decode_worker != sent[0].decode_worker:
            fleet.router.forget(sequence.id)
    assert fleet.send([0] * 22).decode_worker == sent[0].decode_worker


def test_only_the_pool_that_hosts_the_model_covers_its_prompts() -> None:
    fleet = Fleet(pairs=True)
    sent = [fleet.send([i] * 20, hosts=("decode1",)) for i in range(4)]
    assert {(s.prefill_worker, s.decode_worker) for s in sent} == {("prefill1", "decode1")}
    fleet.router.lose("prefill1")
    with pytest.raises(NoWorkerError, match=r"^no prefill worker is alive$"):
        fleet.send([5] * 20, hosts=("decode1",))
    assert fleet.send([5] * 20).decode_worker == "decode0"


def test_by_load_what_the_store_has_is_everywhere() -> None:
    fleet = Fleet(policy="load")
    prompt = list(range(41))
    first = fleet.send(prompt)
    fleet.work_off()
    assert fleet.send(prompt).prefill_worker == first.prefill_worker, "nobody else has it"
    fleet.router.store_changed(first.chain, [])
    busy = fleet.send(list(range(100, 120)))
    assert busy.prefill_worker == other(first.prefill_worker)
    again = fleet.send(prompt)
    assert (again.prefill_worker, again.num_uncached) == (first.prefill_worker, 0), "least waits"
    fleet.send(list(range(200, 260)))
    third = fleet.send([*prompt, 1, 2])
    assert third.prefill_worker == busy.prefill_worker
    assert third.num_uncached == 2


def test_by_load_what_the_store_has_lost_is_routed_by_prefix() -> None:
    fleet = Fleet(policy="load")
    prompt = list(range(41))
    first = fleet.send(prompt)
    fleet.work_off()
    fleet.router.store_changed(first.chain, [])
    fleet.router.store_changed([], first.chain[3:4])
    fleet.send(list(range(100, 110)))
    busy = fleet.send(list(range(200, 210)))
    assert busy.prefill_worker == first.prefill_worker
    again = fleet.send(prompt)
    assert again.prefill_worker == first.prefill_worker, "what it would compute is worth the wait"


def test_by_load_among_equals_who_has_it() -> None:
    fleet = Fleet(policy="load")
    prompt = list(range(41))
    first = fleet.send(prompt)
    second = fleet.send(list(range(100, 141)))
    fleet.router.store_changed([*first.chain, *second.chain], [])
    fleet.work_off()
    for sequence in (first, second):
        found = fleet.send(list(sequence.prompt))
        assert found.prefill_worker == sequence.prefill_worker
        fleet.work_off()
