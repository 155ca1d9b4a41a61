"""Reservations, arrivals and preemptions of a decode core, message by message, without executor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import msgspec
import pytest

from pshare_jax.config import DecodeConfig
from pshare_jax.core import messages as m
from pshare_jax.core.admission import Admission, Reservation
from pshare_jax.core.decode import DecodeCore
from pshare_jax.core.messages import DISPATCHER
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.plans import DecodePlan, DecodeResult, Landed
from pshare_jax.core.requests import Owner, PromptUsage
from pshare_jax.core.sequences import Sequence
from tests.core.sequences import make_sequence
from tests.core.setting import model_specs

PAGE, USABLE, SLOTS, STEPS = 8, 27, 8, 4


def sequence(order: int, prompt: list[int]) -> Sequence:
    return make_sequence(order, prompt, page_size=PAGE)


class Bench:
    """A decode core of 27 pages and 8 slots; a test is its prefill workers and its executor.

    Attributes:
        said: everything that it has told the dispatcher, but for what is in its index.
    """

    def __init__(self) -> None:
        config = DecodeConfig(
            batch_buckets=[4], max_num_seqs=SLOTS, replay_buckets=[4], steps_per_dispatch=STEPS
        )
        self.cache = PageCache(USABLE + 1, PAGE)
        self.core = DecodeCore(
            "decode0",
            self.cache,
            model_specs(["decode0"]),
            config,
            64,
            transfer_ids=itertools.count(),
        )
        self.said: list[m.Message] = []
        self.fetches: dict[int, m.Fetch] = {}
        self.released: list[int] = []

    def cover(self, *sequences: Sequence) -> None:
        """Prompts have been covered; the core hears of it."""
        for covered in sequences:
            usage = PromptUsage(len(covered.prompt), covered.covered, 0, 0)
            self.receive(m.Covered(covered, usage))

    def receive(self, message: m.Message) -> None:
        self.core.receive(message)
        self._hear()

    def schedule(self) -> DecodePlan | None:
        plan = self.core.schedule()
        self._hear()
        return plan

    def apply(self, plan: DecodePlan | None) -> None:
        """The step of a plan has been computed; it has brought no end tokens."""
        assert plan is not None
        assert plan.step is not None
        tokens = [[1] * plan.step.count for _ in plan.step.rows]
        self.core.apply(plan, DecodeResult(plan.number, tokens))
        self._hear()

    def pull(self, id: int) -> int:
        """The pages that a sequence has asked for last are offered; returns the transfer."""
        fetch = self.fetches[id]
        self.receive(m.Offered(fetch.transfer, []))
        plan = self.schedule()
        assert plan is not None
        assert [pull.transfer for pull in plan.pulls] == [fetch.transfer]
        return fetch.transfer

    def land(self, id: int) -> None:
        """They arrive."""
        self.core.landed([Landed(self.pull(id))])

    def run(self, *sequences: Sequence) -> DecodePlan | None:
        """Sequences come in and all their pages arrive; returns the first plan that they are in."""
        for one in sequences:
            self.cover(one)
            self.core.landed([Landed(self.fetches[one.id].transfer)])
        return self.schedule()

    def started(self) -> list[int]:
        return [message.id for message in self.said if isinstance(message, m.Started)]

    def returned(self) -> list[m.Message]:
        return [message for message in self.said if isinstance(message, m.Returned)]

    def _hear(self) -> None:
        while self.core.outbox:
            to, message = self.core.outbox.pop(0)
            if isinstance(message, m.Fetch):
                assert (to, message.worker) == ("prefill0", "decode0")
                self.fetches[message.id] = message
            elif isinstance(message, m.Release):
                assert to == "prefill0"
                self.released.append(message.id)
            elif not isinstance(message, m.IndexChanged):
                assert to == DISPATCHER
                self.said.append(message)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.cache.check()
    bench.core.release_all()


@pytest.fixture
def admission() -> Admission:
    return Admission(PageCache(USABLE + 1, PAGE), SLOTS)


def reserve(admission: Admission, sequence: Sequence) -> Reservation:
    reservation = admission.reserve(sequence)
    assert reservation is not None
    return reservation


def step_rows(plan: DecodePlan | None) -> list[int]:
    assert plan is not None
    return [] if plan.step is None else [row.id for row in plan.step.rows]


def test_pages_on_their_way_are_shared(admission: Admission) -> None:
    one = reserve(admission, sequence(0, [5] * 20))
    two = reserve(admission, sequence(1, [5] * 20))
    assert one.pages[:2] == two.pages[:2], "19 tokens: two full pages are shared"
    assert one.pages[2] != two.pages[2], "the half-filled one is not"
    assert one.slot != two.slot
    assert (one.fill, two.fill) == ([0, 1, 2], [2])
    assert (list(one.arriving), one.awaited) == ([0, 1], {})
    assert two.awaited == one.arriving
    assert {node.filler for node in one.arriving.values()} == {0}


def test_pages_on_their_way_are_waited_for(bench: Bench) -> None:
    bench.cover(sequence(0, [5] * 20), sequence(1, [5] * 20))
    assert (bench.fetches[0].pages, bench.fetches[1].pages) == ([0, 1, 2], [2])
    # The second one's page comes first, over another prefill worker.
    bench.land(1)
    assert bench.schedule() is None
    assert bench.started() == []
    bench.land(0)
    assert step_rows(bench.schedule()) == [0, 1]
    assert sorted(bench.started()) == sorted(bench.released) == [0, 1]
    # What has arrived is shared without waiting, and nothing is fetched.
    bench.cover(sequence(2, [5] * 17))
    assert 2 not in bench.fetches
    bench.schedule()
    assert bench.started()[2:] == [2]
    rows = {row.sequence.id: row for row in bench.core.rows.all()}
    assert rows[2].pages[:2] == rows[1].pages[:2] == rows[0].pages[:2]


def test_a_pull_names_the_keys_and_the_pages_that_were_reserved(bench: Bench) -> None:
    first, second = sequence(0, [5] * 16), sequence(1, [5] * 20)
    bench.cover(first, second)
    assert (bench.fetches[0].pages, bench.fetches[1].pages) == ([0, 1], [1, 2])
    bench.receive(m.Offered(bench.fetches[1].transfer, []))
    plan = bench.schedule()
    assert plan is not None
    [pull] = plan.pulls
    pages = bench.core._arrivals._arrivals[1].reservation.pages
    assert (pull.source, pull.keys, pull.targets) == ("prefill0", second.chain[1:], pages[1:])


def test_a_cancelled_reservation_leaves_nothing(admission: Admission) -> None:
    cache = admission._cache
    room = reserve(admission, sequence(0, [5] * 20))
    for node in reversed(room.arriving.values()):
        cache.forget(node)
    admission.leave(room.slot, room.pages)
    assert cache.num_available == USABLE
    assert admission.num_inside == 0
    assert cache.counts().cached == 0
    cache.check(idle=True)


@pytest.mark.parametrize("stage", ["waits for room", "has asked", "pulls", "is there", "runs"])
def test_an_aborted_sequence_leaves_nothing(bench: Bench, stage: str) -> None:
    first, second = sequence(0, [5] * 212), sequence(1, [6] * 20)
    cancelled: list[int] = []
    if stage == "waits for room":
        bench.cover(first)
    bench.cover(second)
    if stage == "pulls":
        cancelled = [bench.pull(1)]
    if stage in ("is there", "runs"):
        bench.land(1)
    if stage == "runs":
        assert step_rows(bench.schedule()) == [1]
    bench.receive(m.Abort(1))
    if stage == "waits for room":
        bench.receive(m.Abort(0))
    plan = bench.schedule()
    assert (plan.cancelled if plan else []) == cancelled
    assert m.Dropped(1) in bench.said
    assert bench.released.count(1) == 1
    assert bench.core.held_ids() == set()
    assert bench.core.admission.num_inside == 0
    assert bench.cache.num_available == USABLE
    bench.cache.check(idle=True)
    # What arrives after all is nobody's.
    bench.core.landed([Landed(transfer) for transfer in cancelled])
    assert bench.schedule() is None


def test_a_page_for_each_running_sequence_is_left_over(admission: Admission) -> None:
    """27 pages: two sequences of 12 and one of 2 leave one page where two are wanted."""
    for order in range(2):
        reserve(admission, sequence(order, [order] * 96))
    assert admission.reserve(sequence(2, [2] * 16)) is None
    assert admission.num_inside == 2, "a refusal takes nothing"
    assert admission._cache.num_available == 3
    assert admission.reserve(sequence(2, [2] * 8)) is not None


def test_no_slot_no_reservation(bench: Bench) -> None:
    bench.cover(*(sequence(order, [order]) for order in range(SLOTS + 1)))
    assert bench.core.inside_ids() == set(range(SLOTS))
    assert not bench.core.admission.has_slot
    assert bench.core.admission.reserve(sequence(SLOTS, [SLOTS])) is None
    bench.receive(m.Abort(3))
    assert bench.core.inside_ids() == {0, 1, 2, 4, 5, 6, 7, SLOTS}


@pytest.mark.parametrize("leaves", [m.Abort(1), m.Withdrawn(1)])
def test_small_sequences_go_past_one_that_waits_for_pages_but_not_for_ever(
    bench: Bench, leaves: m.Message
) -> None:
    """With several prefill workers, a stream of small prompts could starve a large one."""
    bench.cover(sequence(0, [0] * 120))
    bench.cover(sequence(1, [1] * 121))
    assert bench.core.inside_ids() == {0}, "12 pages are left, and it needs 16"
    for id in range(2, 18):
        bench.cover(sequence(id, [id]))
        assert bench.core.inside_ids() == {0, id}
        bench.receive(m.Abort(id))
    bench.cover(sequence(18, [18]))
    assert bench.core.inside_ids() == {0}, "others have had 16 pages while it waited"
    bench.receive(leaves)
    assert bench.core.inside_ids() == {0, 18}


def test_a_large_sequence_enters_before_younger_ones_of_its_size(bench: Bench) -> None:
    bench.cover(sequence(0, [0] * 120))
    bench.cover(sequence(3, [3] * 122), sequence(1, [1] * 121))
    bench.cover(sequence(-1, [9]))
    assert bench.core.inside_ids() == {-1, 0}, "an older one is not held up"
    for id in (0, -1):
        bench.receive(m.Abort(id))
    assert bench.core.inside_ids() == {1}


def owned(order: int, *, key: str = "", request: str = "", model: str = "lora") -> Sequence:
    owner = Owner(key, 1.0, request)
    made = make_sequence(order, [order % 100, 1], page_size=PAGE, model=model)
    return msgspec.structs.replace(made, owner=owner)


@pytest.mark.parametrize(
    ("flood", "newcomer"),
    [
        ({"request": "n=128"}, {"request": "other"}),
        ({"key": "a"}, {"key": "b"}),
        ({"model": "lora"}, {"model": "alora"}),
    ],
    ids=["requests", "clients", "models"],
)
def test_whoever_has_nothing_gets_the_slot_of_the_youngest_of_a_flood(
    bench: Bench, flood: dict[str, str], newcomer: dict[str, str]
) -> None:
    bench.run(*(owned(order, **flood) for order in range(SLOTS)))
    bench.cover(*(owned(order, **flood) for order in range(SLOTS, 20)))
    assert bench.core.inside_ids() == set(range(SLOTS))
    bench.cover(owned(20, **newcomer))
    assert bench.core.inside_ids() == {0, 1, 2, 3, 4, 5, 6, 20}
    assert bench.returned() == [m.Returned(7, "preempted")]
    # Its second sequence has to wait for a slot like those of the flood; it is first then.
    bench.cover(owned(21, **newcomer))
    bench.cover(owned(30, **flood))
    assert bench.returned() == [m.Returned(7, "preempted")]
    bench.receive(m.Abort(3))
    assert bench.core.inside_ids() == {0, 1, 2, 4, 5, 6, 20, 21}


def test_requests_of_their_own_take_turns_by_age(bench: Bench) -> None:
    """Nobody has more than one slot, so nobody has to give way."""
    bench.run(*(owned(order) for order in range(SLOTS)))
    bench.cover(owned(9), owned(8))
    assert bench.returned() == []
    bench.receive(m.Abort(5))
    assert bench.core.inside_ids() == {0, 1, 2, 3, 4, 6, 7, 8}


def test_a_flood_does_not_take_the_pages_of_a_small_request(bench: Bench) -> None:
    """The youngest of the flood gives way, although the small request is younger."""
    flood = [owned(order, request="flood") for order in range(4)]
    bench.run(*flood, owned(4, request="small"))
    held = bench.cache.allocate(bench.cache.num_available)
    assert held is not None
    while not bench.returned():
        bench.schedule()
    gone = {message.id for message in bench.returned() if isinstance(message, m.Returned)}
    assert 3 in gone
    assert bench.core.inside_ids() == {0, 1, 2, 3, 4} - gone
    assert bench.core.inside_ids() >= {0, 4}
    bench.cache.release(held)


def test_a_full_pool_of_cached_pages_has_room(bench: Bench) -> None:
    """Pages that only the index holds are given up, but not those the newcomer shares."""
    for order in range(2):
        bench.run(sequence(order, [order] * 104))
        bench.receive(m.Abort(order))
    counts = bench.cache.counts()
    assert (counts.used, counts.cached) == (0, 24)
    admission = bench.core.admission
    again = reserve(admission, sequence(2, [0] * 104))
    assert (again.fill, again.awaited) == ([12], {})
    admission.leave(again.slot, again.pages)
    most = reserve(admission, sequence(3, [*[0] * 32, *[7] * 95]))
    assert most.fill == list(range(4, 16))
    assert most.pages[:4] == again.pages[:4]
    nodes = [bench.cache.node_of(page) for page in most.pages[:4]]
    assert [node.tokens for node in nodes if node] == [(0,) * PAGE] * 4


def test_the_youngest_gives_way_when_pages_run_out(bench: Bench) -> None:
    bench.run(sequence(0, [0] * 57), sequence(1, [1] * 64), sequence(2, [2] * 57))
    plan = bench.schedule()
    assert bench.returned() == []
    held = bench.cache.allocate(bench.cache.num_available)
    assert held is not None
    # Two steps of 4 from positions 56 and 63 on: the first and the third need another page now.
    rows = {row.sequence.id: row for row in bench.core.rows.all()}
    assert step_rows(plan) == [0, 1, 2]
    assert [(row.num_kv, len(row.pages)) for row in rows.values()] == [(64, 8), (71, 9), (64, 8)]
    plan = bench.schedule()
    assert bench.returned() == [m.Returned(2, "preempted")]
    assert step_rows(plan) == [0, 1]
    assert len(rows[0].pages) == 9
    assert bench.core.stats.preemptions == {"lora": 1}
    bench.cache.release(held)


def test_the_youngest_waits_for_one_that_is_still_on_its_way(bench: Bench) -> None:
    """That one is younger, and its pages will be there to be taken once it runs."""
    bench.cover(sequence(0, [0] * 89), sequence(1, [1] * 96), sequence(2, [2] * 8))
    held = bench.cache.allocate(2)
    assert held is not None
    assert bench.cache.num_available == 0
    bench.core.landed([Landed(bench.fetches[id].transfer) for id in (0, 1)])
    plan = bench.schedule()
    assert step_rows(plan) == [0], "the younger one has no page for its next token"
    assert bench.core.rows.ids() == {0, 1}
    assert bench.returned() == []
    bench.receive(m.Abort(2))
    last = bench.cache.allocate(1)
    assert last is not None
    plan = bench.schedule()
    assert bench.returned() == [m.Returned(1, "preempted")], "it is covered again later"
    assert step_rows(plan) == [0]
    assert step_rows(bench.schedule()) == [0]
    assert len(bench.core.rows.all()[0].pages) == 13, "of those that have been given back"
    bench.cache.release([*held, *last])


def test_one_that_is_alone_waits_for_pages(bench: Bench) -> None:
    held = bench.cache.allocate(14)
    assert held is not None
    bench.cover(sequence(0, [0] * 96))
    last = bench.cache.allocate(bench.cache.num_available)
    assert last is not None
    bench.land(0)
    plan = bench.schedule()
    assert step_rows(plan) == []
    assert bench.schedule() is None
    assert bench.returned() == []
    bench.cache.release([*held, *last])
    assert step_rows(bench.schedule()) == [0]


def test_tokens_of_a_row_that_was_preempted_meanwhile_are_dropped(bench: Bench) -> None:
    first = bench.run(sequence(0, [0] * 64), sequence(1, [1] * 57))
    held = bench.cache.allocate(bench.cache.num_available)
    assert held is not None
    second = bench.schedule()
    third = bench.schedule()
    assert [step_rows(plan) for plan in (first, second, third)] == [[0, 1], [0, 1], [0]]
    assert bench.returned() == [m.Returned(1, "preempted")]
    bench.said.clear()
    bench.apply(first)
    bench.apply(second)
    bench.apply(third)
    assert [(t.id, len(t.token_ids)) for t in bench.said if isinstance(t, m.Tokens)] == [
        (0, STEPS)
    ] * 3
    bench.cache.release(held)


def test_a_fetch_that_fails_twice_gives_the_room_back(bench: Bench) -> None:
    bench.cover(sequence(0, [5] * 20))
    first = bench.fetches[0]
    bench.receive(m.NotOffered(first.transfer, "not there"))
    second = bench.fetches[0]
    assert second.transfer != first.transfer
    assert second.pages == first.pages
    # What is said of the first is old.
    bench.receive(m.NotOffered(first.transfer, "not there"))
    assert bench.returned() == []
    bench.receive(m.NotOffered(second.transfer, "gone"))
    assert bench.returned() == [m.Returned(0, "fetch", "gone")]
    assert bench.released == [0]
    assert bench.core.stats.failed_transfers == 2
    assert bench.cache.num_available == USABLE
    bench.cache.check(idle=True)
