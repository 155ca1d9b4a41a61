"""What the prefill core writes to the store, and whose the pages are that come from there."""

from __future__ import annotations

import msgspec

from pshare_jax.core import messages as m
from pshare_jax.core.admission import Admission
from pshare_jax.core.pages.prefix_index import PageState
from pshare_jax.core.pool_prompts import PoolPrompts
from pshare_jax.core.prices import SHARED
from pshare_jax.core.requests import Owner
from pshare_jax.core.store_client import PIECE_PAGES
from tests.core.store_bench import PAGE, Bench


def test_pages_that_were_let_go_are_written_once():
    bench = Bench()
    sequence = bench.ask(10)
    bench.store()
    bench.core.receive(m.Looked(sequence.id, []))
    bench.chunk()
    bench.chunk()
    bench.core.receive(m.Release(sequence.id))
    plan = bench.store()
    assert plan is not None
    assert [save.key for save in plan.saves] == sequence.chain
    assert [len(save.tokens) for save in plan.saves] == [4, 4, 2]
    assert bench.store() is None
    bench.core.receive(m.Stored(sequence.chain, sequence.chain, []))
    again = bench.ask(10)
    assert bench.store() is None
    assert bench.covered() == [sequence.id, again.id]
    bench.core.receive(m.Release(again.id))
    plan = bench.store()
    assert plan is not None
    assert (plan.saves, plan.touched) == ([], sequence.chain)
    bench.core.receive(m.Stored([], [], sequence.chain[1:2]))
    once_more = bench.ask(10)
    bench.store()
    bench.core.receive(m.Release(once_more.id))
    plan = bench.store()
    assert plan is not None
    assert [save.key for save in plan.saves] == sequence.chain[1:2]


def test_what_another_worker_computed_is_not_written():
    """Nor what was computed from it: the keys of the store say that this worker's kernels did."""
    bench = Bench()
    sequence = bench.ask(10)
    bench.store()
    bench.core.receive(m.Looked(sequence.id, []))
    bench.chunk()
    bench.chunk()
    second = bench.core.cache.match(sequence.keys, sequence.prompt)[1]
    second.borrowed = True
    bench.core.receive(m.Release(sequence.id))
    plan = bench.store()
    assert plan is not None
    assert [save.key for save in plan.saves] == sequence.chain[:1]


def test_what_was_evicted_is_not_written():
    bench = Bench(pages=6)
    sequence = bench.ask(16)
    bench.store()
    bench.core.receive(m.Looked(sequence.id, []))
    bench.chunk()
    bench.chunk()
    bench.core.receive(m.Release(sequence.id))
    pages = bench.cache.allocate(3)
    assert pages is not None
    plan = bench.store()
    assert plan is not None
    assert [save.key for save in plan.saves] == sequence.keys[:2]
    bench.cache.release(pages)


def test_pages_that_arrive_are_not_given_to_others():
    bench = Bench()
    sequence = bench.ask(8)
    bench.store()
    bench.core.receive(m.Looked(sequence.id, [SHARED, SHARED]))
    bench.store()
    nodes = bench.cache.match(sequence.keys, sequence.prompt)
    assert [node.state for node in nodes] == [PageState.ARRIVING] * 2
    bench.cache.release([node.page for node in nodes])
    prompts = PoolPrompts(bench.core)
    (run,) = prompts.holders([])
    assert (run.sequence, prompts.hold_pages) == (sequence, True)
    assert prompts.give_way(run), "the pages of a run can be had by others"
    assert not prompts.give_way(run)
    assert bench.cache.matched_tokens(sequence.keys, sequence.prompt) == 0


def test_prompts_that_are_looked_for_are_work_of_the_worker():
    bench = Bench()
    sequence = bench.ask(12)
    bench.store()
    assert bench.core.loads() == {sequence.id: 12}
    bench.core.receive(m.Looked(sequence.id, [SHARED] * 3))
    bench.store()
    assert bench.core.loads() == {sequence.id: 12}


def test_pages_of_prompts_that_are_looked_for_count_for_their_client():
    """It is the turn of a client that holds nothing, though the other one has asked before."""
    bench = Bench()
    prompts = [bench.prompt(16 * PAGE, seed) for seed in range(3)]
    owners = [Owner(key="first"), Owner(key="first"), Owner(key="second")]
    first, again, other = (
        msgspec.structs.replace(prompt, owner=owner)
        for prompt, owner in zip(prompts, owners, strict=True)
    )
    bench.core.receive(m.Prefill(first))
    plan = bench.store()
    assert plan is not None
    assert [look.id for look in plan.looks] == [first.id]
    for sequence in (again, other):
        bench.core.receive(m.Prefill(sequence))
    plan = bench.store()
    assert plan is not None
    assert [look.id for look in plan.looks] == [other.id]


def test_only_pages_that_were_looked_for_are_fetched():
    """Pages that a row of the pool was to bring were not, and have not come."""
    bench = Bench()
    admission = Admission(bench.cache, 4)
    room = admission.reserve(bench.prompt(8))
    assert room is not None
    assert sorted(room.arriving) == [0, 1]
    sequence = bench.ask(24)
    plan = bench.store()
    assert plan is not None
    assert [look.keys for look in plan.looks] == [sequence.keys[2:]]
    for number in (1, 0):
        bench.cache.forget(room.arriving[number])
    bench.core.receive(m.Looked(sequence.id, [SHARED] * 4))
    (chunk,) = bench.chunk().chunks
    assert (chunk.id, chunk.start) == (sequence.id, 0)
    admission.leave(room.slot, room.pages)


def test_pages_that_have_come_are_for_all_though_more_are_on_their_way():
    bench = Bench(pages=200)
    long = bench.ask(PAGE * (PIECE_PAGES + 2))
    bench.store()
    bench.core.receive(m.Looked(long.id, [SHARED] * (PIECE_PAGES + 2)))
    plan = bench.store()
    assert plan is not None
    first, second = plan.loads
    short = bench.ask(12)
    assert bench.store() is None, "it waits for the first piece"
    bench.core.receive(m.Loaded(first.transfer))
    bench.store()
    assert bench.store() is None
    assert bench.covered() == [short.id]
    bench.core.receive(m.Loaded(second.transfer))
    bench.store()
    assert bench.store() is None
    assert bench.covered() == [long.id]
    for id in (short.id, long.id):
        bench.core.receive(m.Release(id))
    bench.cache.check(idle=True)
