"""What is given up between a message and the next plan: nothing of it is done any more.

Its pages may be somebody else's by then, so what is pulled, offered or admitted all the same would
be read as theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import msgspec
import pytest

from pshare_jax.core import messages as m
from pshare_jax.core.admission import Admission
from pshare_jax.core.arrivals import Arrivals
from pshare_jax.core.borrowing import Borrowing
from pshare_jax.core.loans import Loans
from pshare_jax.core.messages import Outbox, PageDescriptor
from pshare_jax.core.pages.allocator import PADDING_PAGE
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.prefix_index import block_keys, root_key
from pshare_jax.core.plans import Landed, PrefillResult
from pshare_jax.core.prefill_task import PrefillTask
from pshare_jax.core.prices import SHARED
from pshare_jax.core.requests import PromptUsage
from pshare_jax.core.sequences import Sequence
from pshare_jax.core.stats import PrefillStats
from tests.core import store_bench
from tests.core.decode_bench import Bench, decode_bench, sequence, step_rows
from tests.core.sequences import make_sequence
from tests.core.test_page_cache import fill

PAGE = PageDescriptor(b"", (0, 1), (2, 1, 8, 1), "float32", "raw", 0)


@pytest.fixture
def bench() -> Iterator[Bench]:
    with decode_bench() as bench:
        yield bench


def test_what_is_on_offer_for_one_who_has_gone_is_not_pulled(bench: Bench) -> None:
    bench.cover(sequence(0, [5] * 20))
    transfer = bench.fetches[0].transfer
    bench.receive(m.Offered(transfer, []))
    assert bench.core.urgent
    bench.receive(m.Abort(0))
    plan = bench.schedule()
    assert plan is not None
    assert (plan.pulls, plan.cancelled) == ([], [transfer])
    assert bench.schedule() is None
    bench.cache.check(idle=True)


def test_who_waits_for_pages_of_one_who_has_gone_asks_for_them_himself(bench: Bench) -> None:
    """What was on offer for the other one is not pulled for him."""
    first, second = sequence(0, [5] * 20), sequence(1, [5] * 20)
    bench.cover(first, second)
    old = bench.fetches[0].transfer
    bench.receive(m.Offered(old, []))
    bench.receive(m.Abort(0))
    assert (bench.fetches[1].pages, bench.fetches[1].transfer) == ([0, 1], 2)
    bench.receive(m.Offered(2, []))
    plan = bench.schedule()
    assert plan is not None
    assert ([pull.transfer for pull in plan.pulls], plan.cancelled) == ([2], [old])
    assert plan.pulls[0].keys == second.chain[:2]


def test_what_is_on_offer_and_there_already_is_not_written_again(bench: Bench) -> None:
    """A row reads those pages now; only the last one is this sequence's own."""
    bench.run(sequence(0, [5] * 20))
    usage = PromptUsage(20, 19, 0, 0)
    bench.receive(m.Covered(sequence(1, [5] * 20), usage, m.Offered(70, [PAGE] * 3), 0))
    plan = bench.schedule()
    assert plan is not None
    [pull] = plan.pulls
    [arrival] = bench.core._arrivals._arrivals.values()
    assert pull.targets == [PADDING_PAGE, PADDING_PAGE, arrival.reservation.pages[2]]
    assert pull.keys == sequence(1, [5] * 20).chain
    assert bench.core.stats.used_offers == 1


def test_a_row_that_gives_way_in_the_plan_in_which_it_has_come_is_not_admitted(
    bench: Bench,
) -> None:
    """Its slot may be another's in the next one."""
    bench.cover(sequence(0, [0] * 64), sequence(1, [1] * 57))
    bench.core.landed([Landed(bench.fetches[id].transfer) for id in (0, 1)])
    held = bench.cache.allocate(bench.cache.num_available)
    assert held is not None
    plan = bench.schedule()
    assert plan is not None
    assert step_rows(plan) == [0]
    assert [admit.id for admit in plan.admits] == [0]
    assert bench.returned() == [m.Returned(1, "preempted")]
    bench.cache.release(held)


def test_pages_that_left_the_index_are_nobodys_to_hand_on() -> None:
    """Who was to bring them goes before those that wait have looked: each fetches his own."""
    bench = store_bench.Bench()
    asked = bench.ask(16)
    bench.store()
    bench.core.receive(m.Looked(asked.id, [SHARED] * 2))
    plan = bench.store()
    assert plan is not None
    admission, outbox = Admission(bench.cache, 4), Outbox()
    arrivals = Arrivals("decode0", bench.cache, outbox, itertools.count(100))
    rows = [msgspec.structs.replace(asked, id=id, order=id) for id in (97, 98, 99)]
    rooms = [admission.reserve(row) for row in rows]
    for row, room in zip(rows, rooms, strict=True):
        assert room is not None
        arrivals.add(row, PromptUsage(17, 0, 16, 0), room)
    assert outbox == [("prefill0", m.Fetch("decode0", 100, 97, [2, 3]))]
    bench.core.receive(m.Loaded(plan.loads[0].transfer, "a page is not what was asked for"))
    assert arrivals.remove(97) is not None
    assert outbox[1:] == [], "nobody brings them for others"
    assert arrivals.refetch() == []
    assert outbox[1:] == [
        ("prefill0", m.Fetch("decode0", 101, 98, [0, 1, 2, 3])),
        ("prefill0", m.Fetch("decode0", 102, 99, [0, 1, 2, 3])),
    ]
    first, second = (set(room.pages) for room in rooms[1:] if room is not None)
    assert (len(first), len(second), first & second) == (5, 5, set())
    for room in rooms:
        assert room is not None
        admission.leave(room.slot, room.pages)
    bench.core.release_all()
    bench.cache.check(idle=True)


def test_a_loan_that_is_repaid_before_it_was_made_is_not_put_on_offer() -> None:
    tokens = [1, 2, 3, 4]
    cache, outbox = PageCache(5, 2), Outbox()
    cache.release(fill(cache, tokens))
    loans = Loans("decode0", cache, outbox)
    keys = cache.keys()
    loans.lend(m.Lend("prefill1", 7, 3, keys, tuple(tokens)))
    loans.lend(m.Lend("prefill1", 8, 4, keys, tuple(tokens)))
    assert (cache.counts().used, loans.ids()) == (2, {3, 4})
    loans.repaid(3)
    offers = loans.take_offers()
    assert [(offer.transfer, offer.keys) for offer in offers] == [(8, keys)]
    assert loans.take_ended() == [7]
    loans.offered(offers, PrefillResult(offered={8: [PAGE, PAGE]}))
    assert outbox == [("prefill1", m.Offered(8, [PAGE, PAGE], "", 4))]
    cache.check(idle=True)


def borrowed(cache: PageCache, id: int) -> tuple[PrefillTask, Sequence]:
    """A prompt of eight tokens that another worker has."""
    made = make_sequence(id, [*range(8), 9], page_size=4)
    made = msgspec.structs.replace(made, lender="decode0")
    pages = cache.allocate(2)
    assert pages is not None
    return PrefillTask(made, pages), made


def test_borrowed_pages_of_one_who_has_gone_are_not_pulled() -> None:
    """And what is on offer is given up: it may have been read since that was heard."""
    cache, outbox = PageCache(9, 4), Outbox()
    borrowing = Borrowing("prefill0", cache, outbox, itertools.count(50), PrefillStats())
    task, asked = borrowed(cache, 3)
    assert borrowing.ask(task)
    keys = block_keys(root_key("base", ""), range(8), 4)
    assert outbox == [("decode0", m.Lend("prefill0", 50, 3, keys, tuple(range(8))))]
    borrowing.offered(m.Offered(50, [PAGE, PAGE], "there", 3))
    assert borrowing.urgent
    assert borrowing.abort(asked.id) is task
    assert (borrowing.take_pulls(), borrowing.take_cancelled()) == ([], [50])
    assert outbox[1:] == [("decode0", m.Repaid(3, 50))]
    assert not borrowing.waits
