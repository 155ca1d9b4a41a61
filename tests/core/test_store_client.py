"""The prefill core's side of the store: what it asks, waits for, and gives up."""

from __future__ import annotations

import pytest

from pshare_jax.core import messages as m
from pshare_jax.core.plans import PrefillResult
from pshare_jax.core.pool_prompts import PoolPrompts
from pshare_jax.core.prefill import STORE_SECONDS
from pshare_jax.core.prices import DISK, SHARED, Prices
from pshare_jax.core.sequences import Sequence
from pshare_jax.core.store_client import MAX_LATE, MAX_LOADS, PIECE_PAGES
from tests.core.store_bench import PAGE, Bench


def test_what_the_store_has_is_fetched_and_not_computed():
    bench = Bench()
    sequence = bench.ask(10)
    plan = bench.store()
    assert plan is not None
    assert [(look.id, look.keys) for look in plan.looks] == [(sequence.id, sequence.chain)]
    assert bench.store() is None
    assert bench.core.patience == STORE_SECONDS
    bench.core.receive(m.Looked(sequence.id, [SHARED] * 3))
    plan = bench.store()
    assert plan is not None
    (load,) = plan.loads
    assert load.keys == sequence.chain
    assert load.tokens == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert bench.covered() == []
    bench.core.receive(m.Loaded(load.transfer))
    plan = bench.store()
    assert plan is not None
    assert [commit.transfer for commit in plan.commits] == [load.transfer]
    assert bench.store() is None
    assert bench.covered() == [sequence.id]
    assert bench.core.patience is None
    assert bench.client.stats.fetched_tokens == 10
    bench.core.receive(m.Release(sequence.id))
    bench.cache.check(idle=True)


def test_what_the_store_does_not_have_is_computed():
    bench = Bench()
    sequence = bench.ask(12)
    bench.store()
    bench.core.receive(m.Looked(sequence.id, [SHARED]))
    plan = bench.store()
    assert plan is not None
    bench.core.receive(m.Loaded(plan.loads[0].transfer))
    bench.store()
    (chunk,) = bench.chunk().chunks
    assert (chunk.start, len(chunk.tokens)) == (4, 8)


def test_a_second_prompt_waits_for_the_pages_that_are_fetched():
    bench = Bench()
    first, second = bench.ask(8), bench.ask(12)
    plan = bench.store()
    assert plan is not None
    assert [look.id for look in plan.looks] == [first.id]
    bench.core.receive(m.Looked(first.id, [SHARED, SHARED]))
    plan = bench.store()
    assert plan is not None
    assert bench.store() is None, "nothing is computed that is on its way"
    bench.core.receive(m.Loaded(plan.loads[0].transfer))
    bench.store()
    plan = bench.store()
    assert plan is not None
    assert [(look.id, look.keys) for look in plan.looks] == [(second.id, second.keys[2:])]
    bench.core.receive(m.Looked(second.id, []))
    (chunk,) = bench.chunk().chunks
    assert (chunk.id, chunk.start) == (second.id, 8)
    assert bench.covered() == [first.id, second.id]


@pytest.mark.parametrize("how", ["failed", "late"])
def test_what_does_not_come_is_computed(how):
    bench = Bench()
    sequence = bench.ask(8)
    bench.store()
    bench.core.receive(m.Looked(sequence.id, [SHARED, SHARED]))
    plan = bench.store()
    assert plan is not None
    (load,) = plan.loads
    if how == "failed":
        bench.core.receive(m.Loaded(load.transfer, "its checksum is wrong"))
    else:
        bench.store()
        bench.now += 1.0
        dropped = bench.store()
        assert dropped is not None
        assert dropped.dropped == [load.transfer]
    (chunk,) = bench.chunk().chunks
    assert (chunk.start, len(chunk.tokens)) == (0, 8)
    assert bench.covered() == [sequence.id]
    if how == "late":
        bench.core.receive(m.Loaded(load.transfer))
        plan = bench.store()
        assert plan is not None
        assert plan.dropped == [load.transfer], "it lies there, and nobody wants it"
    bench.core.receive(m.Release(sequence.id))
    bench.cache.check(idle=True)


def test_a_page_that_follows_one_that_failed_is_not_found():
    bench = Bench(pages=200)
    tokens = PAGE * (PIECE_PAGES + 2)
    sequence = bench.ask(tokens)
    bench.store()
    bench.core.receive(m.Looked(sequence.id, [SHARED] * (PIECE_PAGES + 2)))
    plan = bench.store()
    assert plan is not None
    first, second = plan.loads
    bench.core.receive(m.Loaded(second.transfer))
    bench.store()
    bench.core.receive(m.Loaded(first.transfer, "gone"))
    assert bench.cache.matched_tokens(sequence.keys, sequence.prompt) == 0
    (chunk,) = bench.chunk().chunks
    assert chunk.start == 0


def test_an_answer_is_not_waited_for_longer_than_computing_takes():
    bench = Bench()
    sequence = bench.ask(8)
    bench.store()
    assert bench.store() is None
    bench.now += 0.05
    assert bench.store() is None
    bench.now += 0.05
    (chunk,) = bench.chunk().chunks
    assert chunk.id == sequence.id
    assert (bench.client.stats.late, bench.client.stats.stall_seconds) == (1, pytest.approx(0.1))
    bench.core.receive(m.Looked(sequence.id, [SHARED]))
    assert bench.store() is None, "it is too late"


def test_a_store_that_does_not_answer_is_not_asked_any_more():
    bench = Bench(pages=100)
    sequences = [bench.ask(8, seed) for seed in range(MAX_LATE)]
    bench.store()
    bench.store()
    bench.now += 1.0
    for _ in sequences:
        bench.chunk()
    bench.ask(8, 20)
    assert bench.chunk()
    bench.core.receive(m.Looked(sequences[0].id, []))
    bench.ask(8, 21)
    plan = bench.store()
    assert plan is not None
    assert len(plan.looks) == 1


def test_computing_what_is_cheaper():
    bench = Bench(prices=Prices(0.001, 0.0, {SHARED: 0.001}, {SHARED: 0.1}))
    bench.ask(8)
    assert bench.chunk()
    assert bench.client.stats.looks == 0


def test_what_was_declined_is_not_looked_for_again():
    prices = Prices(0.001, 0.0, {SHARED: 0.0, DISK: 0.1}, {SHARED: 0.001, DISK: 0.1})
    bench = Bench(prices=prices)
    sequence = bench.ask(8)
    bench.store()
    bench.core.receive(m.Looked(sequence.id, [DISK, DISK]))
    (chunk,) = bench.chunk().chunks
    assert (chunk.start, bench.client.stats.looks) == (0, 1)


def test_prompts_that_are_fetched_for_are_work_that_waits_too():
    """Computing is not taken for free because all that waits is being fetched."""
    prices = Prices(0.001, 0.0, {SHARED: 0.0}, {SHARED: 0.003})
    bench = Bench(prices=prices)
    first, second = bench.ask(16), bench.ask(16, seed=1)
    bench.store()
    bench.core.receive(m.Looked(first.id, [SHARED] * 4))
    bench.core.receive(m.Looked(second.id, [SHARED] * 4))
    plan = bench.store()
    assert plan is not None
    assert [len(load.keys) for load in plan.loads] == [4, 4]
    assert bench.client.stats.declined == 0


def looked_for_with_room(bench: Bench) -> Sequence:
    """A prompt for which there was no room when it came, and which has some now."""
    taken = bench.cache.allocate(6)
    assert taken is not None
    sequence = bench.ask(16)
    assert bench.store() is None, "there is no room"
    bench.cache.release(taken)
    plan = bench.store()
    assert plan is not None
    assert [look.id for look in plan.looks] == [sequence.id]
    assert bench.cache.num_available == 4, "it has its pages"
    return sequence


def test_what_had_no_room_is_fetched_when_there_is_some():
    bench = Bench(pages=9)
    sequence = looked_for_with_room(bench)
    bench.core.receive(m.Looked(sequence.id, [SHARED] * 4))
    plan = bench.store()
    assert plan is not None
    bench.core.receive(m.Loaded(plan.loads[0].transfer))
    bench.store()
    assert bench.store() is None
    assert bench.covered() == [sequence.id]
    assert (bench.client.stats.looks, bench.client.stats.fetched_tokens) == (1, 16)


@pytest.mark.parametrize("end", ["abort", "late", "stop"])
def test_what_is_looked_for_gives_its_pages_back(end: str):
    bench = Bench(pages=9)
    sequence = looked_for_with_room(bench)
    match end:
        case "abort":
            bench.core.receive(m.Abort(sequence.id, "decode0"))
        case "late":
            for _ in range(8):
                bench.now += 1.0
                if (plan := bench.core.schedule(bench.now)) is not None:
                    bench.core.apply(plan, PrefillResult())
            assert bench.covered() == [sequence.id]
            assert bench.client.stats.fetched_tokens == 0
            bench.core.receive(m.Release(sequence.id))
        case "stop":
            bench.core.release_all()
    bench.cache.check(idle=True)


def test_what_has_come_stays_until_it_is_used():
    """Pages that were fetched for a prompt cannot be taken by others before it has its turn."""
    bench = Bench(pages=9)
    first = bench.ask(20)
    bench.store()
    bench.core.receive(m.Looked(first.id, [SHARED] * 4))
    plan = bench.store()
    assert plan is not None
    bench.core.receive(m.Loaded(plan.loads[0].transfer))
    bench.store()
    assert bench.cache.num_available == 3
    assert bench.cache.allocate(4) is None
    (chunk,) = bench.chunk().chunks
    assert (chunk.id, chunk.start, len(chunk.tokens)) == (first.id, 16, 4)
    assert bench.covered() == [first.id]
    assert bench.client.stats.looks == 1
    bench.core.receive(m.Release(first.id))
    bench.cache.check(idle=True)


def test_a_prompt_whose_run_gives_way_starts_anew():
    bench = Bench(pages=9)
    first = bench.ask(16)
    bench.store()
    bench.core.receive(m.Looked(first.id, [SHARED] * 4))
    plan = bench.store()
    assert plan is not None
    prompts = PoolPrompts(bench.core)
    (run,) = prompts.holders(())
    assert prompts.give_way(run)
    assert bench.cache.num_available == 8
    bench.core.receive(m.Loaded(plan.loads[0].transfer))
    bench.store()
    again = bench.store()
    assert again is not None
    assert [look.id for look in again.looks] == [first.id]
    bench.core.receive(m.Abort(first.id, "decode0"))
    bench.cache.check(idle=True)


def test_a_run_holds_what_it_goes_on_from():
    """The pages before it are not evicted while it is on its way."""
    bench = Bench(pages=8)
    first = bench.ask(8)
    bench.store()
    bench.core.receive(m.Looked(first.id, []))
    bench.chunk()
    bench.core.receive(m.Release(first.id))
    bench.store()
    second = bench.ask(16)
    bench.store()
    bench.core.receive(m.Looked(second.id, [SHARED, SHARED]))
    plan = bench.store()
    assert plan is not None
    assert bench.cache.counts().used == 4
    assert bench.cache.allocate(4) is None
    bench.core.receive(m.Loaded(plan.loads[0].transfer))
    bench.store()
    assert bench.store() is None
    assert bench.covered() == [first.id, second.id]


def test_few_pieces_lie_in_the_hosts_memory_at_once():
    bench = Bench(pages=400)
    count = PIECE_PAGES * (MAX_LOADS + 2)
    sequence = bench.ask(PAGE * count)
    bench.store()
    bench.core.receive(m.Looked(sequence.id, [SHARED] * count))
    plan = bench.store()
    assert plan is not None
    assert len(plan.loads) == MAX_LOADS
    assert bench.store() is None
    bench.core.receive(m.Loaded(plan.loads[0].transfer))
    plan = bench.store()
    assert plan is not None
    assert (len(plan.loads), len(plan.commits)) == (1, 1)


def test_who_has_gone_is_not_looked_for():
    bench = Bench()
    sequence = bench.ask(8)
    bench.store()
    bench.core.receive(m.Abort(sequence.id, "decode0"))
    assert ("dispatcher", m.Dropped(sequence.id)) in bench.core.outbox
    bench.core.receive(m.Looked(sequence.id, [SHARED, SHARED]))
    assert bench.store() is None
    bench.cache.check(idle=True)
