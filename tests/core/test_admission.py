"""Who gets room in a decode core, and what is on its way to whom, message by message."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from pshare_jax.core import messages as m
from pshare_jax.core.admission import Admission, Reservation
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.plans import Landed
from pshare_jax.core.requests import Owner
from pshare_jax.core.sequences import Sequence
from tests.core.decode_bench import PAGE, SLOTS, USABLE, Bench, decode_bench, sequence, step_rows
from tests.core.sequences import make_sequence


@pytest.fixture
def bench() -> Iterator[Bench]:
    with decode_bench() as bench:
        yield bench


@pytest.fixture
def admission() -> Admission:
    return Admission(PageCache(USABLE + 1, PAGE), SLOTS)


def reserve(admission: Admission, sequence: Sequence) -> Reservation:
    reservation = admission.reserve(sequence)
    assert reservation is not None
    return reservation


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
