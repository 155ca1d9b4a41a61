"""Pages that are on their way, and everybody else who wants the same ones meanwhile."""

from __future__ import annotations

import msgspec
import pytest

from pshare_jax.config import DecodeConfig
from pshare_jax.core import messages as m
from pshare_jax.core.admission import Admission
from pshare_jax.core.arrivals import Arrivals
from pshare_jax.core.decode import DecodeCore
from pshare_jax.core.one_pool import OnePool
from pshare_jax.core.pages.prefix_index import PageState
from pshare_jax.core.plans import PrefillResult
from pshare_jax.core.prices import SHARED
from pshare_jax.core.requests import FinishReason, PromptUsage
from pshare_jax.core.sequences import Sequence
from tests.core.scripted import Host, Setting
from tests.core.setting import model_specs
from tests.core.store_bench import Bench
from tests.core.test_prefetch import Early


def computing(bench: Bench, tokens: int) -> Sequence:
    """A prompt that the store does not have, of which the first chunk has been computed."""
    sequence = bench.ask(tokens)
    bench.store()
    bench.core.receive(m.Looked(sequence.id, []))
    (chunk,) = bench.chunk().chunks
    assert (chunk.start, len(chunk.tokens)) == (0, 8)
    return sequence


@pytest.mark.parametrize("when", ["looked for", "fetched"])
def test_what_is_being_computed_is_not_fetched_ahead(when: str):
    """An agent whose prompt begins like the present one's is expected while that is computed."""
    bench = Early()
    if when == "looked for":
        sequence = computing(bench, 24)
        expected = msgspec.structs.replace(sequence, id=99)
        bench.core.receive(m.Expected(expected))
        plan = bench.core.schedule(0.0)
        assert plan is not None
        bench.core.apply(plan, PrefillResult())
        bench.core.receive(m.Looked(99, [SHARED] * 6))
    else:
        expected = msgspec.structs.replace(bench.expect(24), id=99)
        bench.ahead.clear()
        bench.core.receive(m.Expected(expected))
        (look,) = bench.plan().looks
        assert look.ahead
        sequence = computing(bench, 24)
        # What came was the same prompt; here it is another one that begins like it.
        assert bench.ahead._looking is not None
        bench.ahead._looking.came = False
        bench.core.receive(m.Looked(99, [SHARED] * 6))
    computed = []
    while not bench.covered():
        plan = bench.core.schedule(0.0)
        assert plan is not None
        computed += [(chunk.start, len(chunk.tokens)) for chunk in plan.chunks]
        assert plan.store is None or not plan.store.loads, "it is there in a moment"
        bench.core.apply(plan, PrefillResult())
    assert sum(length for _, length in computed) >= 8, "all of it was computed"
    bench.core.receive(m.Release(sequence.id))


def test_a_prompt_does_not_use_pages_that_a_row_of_the_same_pool_is_still_fetching():
    """A mesh that was given to decode still computes what it has begun."""
    bench = Bench()
    sequence = computing(bench, 24)
    admission = Admission(bench.cache, 4)
    other = msgspec.structs.replace(sequence, id=99, prefill_worker="prefill1")
    room = admission.reserve(other)
    assert room is not None
    assert sorted(room.arriving) == [2, 3, 4, 5]
    assert bench.core.schedule(0.0) is None, "it waits until they are there"
    assert bench.covered() == []
    for number in (2, 3):
        room.arriving[number].state = PageState.READY
    assert bench.core.schedule(0.0) is None
    for number in (5, 4):
        bench.cache.forget(room.arriving[number])
    (chunk,) = bench.chunk().chunks
    assert (chunk.start, len(chunk.tokens)) == (16, 8)
    assert bench.covered() == [sequence.id]
    admission.leave(room.slot, room.pages)
    bench.core.receive(m.Release(sequence.id))
    bench.cache.check(idle=True)


def test_a_prompt_that_enters_does_not_use_them_either():
    bench = Bench()
    sequence = bench.ask(16)
    bench.store()
    bench.core.receive(m.Looked(sequence.id, []))
    admission = Admission(bench.cache, 4)
    room = admission.reserve(msgspec.structs.replace(sequence, id=99))
    assert room is not None
    assert bench.core.schedule(0.0) is None
    for node in room.arriving.values():
        node.state = PageState.READY
    assert bench.core.schedule(0.0) is None
    assert bench.covered() == [sequence.id]
    admission.leave(room.slot, room.pages)


def test_a_row_fetches_what_the_store_could_not_give():
    """It waited for a page of the same pool that a prompt had fetched from the store."""
    bench = Bench()
    sequence = bench.ask(12)
    bench.store()
    bench.core.receive(m.Looked(sequence.id, [SHARED] * 3))
    plan = bench.store()
    assert plan is not None
    admission, outbox = Admission(bench.cache, 4), []
    arrivals = Arrivals("decode0", bench.cache, outbox, iter(range(100, 200)))
    row = msgspec.structs.replace(sequence, id=99, prefill_worker="prefill1")
    room = admission.reserve(row)
    assert room is not None
    assert sorted(room.awaited) == [0, 1, 2]
    arrivals.add(row, PromptUsage(13, 0, 12, 0), room)
    assert arrivals.complete() == []
    bench.core.receive(m.Loaded(plan.loads[0].transfer, "a page is not what was asked for"))
    assert arrivals.refetch() == arrivals.complete() == []
    assert outbox == [("prefill1", m.Fetch("decode0", 100, 99, [0, 1, 2]))]
    arrivals.offered(100, [])
    arrivals.landed(100)
    (done,) = arrivals.complete()
    assert done.sequence.id == 99
    admission.leave(room.slot, room.pages)
    bench.cache.check()


def test_who_has_waited_in_vain_does_not_share_the_pages_that_are_computed_now():
    """The prompt computes them, which may fail half-way, while rows already read what they have."""
    bench = Bench()
    sequence = bench.ask(12)
    bench.store()
    bench.core.receive(m.Looked(sequence.id, [SHARED] * 3))
    plan = bench.store()
    assert plan is not None
    admission, outbox = Admission(bench.cache, 4), []
    arrivals = Arrivals("decode0", bench.cache, outbox, iter(range(100, 200)))
    rooms = []
    for id in (98, 99):
        row = msgspec.structs.replace(sequence, id=id, order=id, prefill_worker="prefill1")
        room = admission.reserve(row)
        assert room is not None
        assert room.fill == []
        rooms.append(room)
        arrivals.add(row, PromptUsage(13, 0, 12, 0), room)
    assert rooms[0].pages[:3] == rooms[1].pages[:3]
    bench.core.receive(m.Loaded(plan.loads[0].transfer, "a page is not what was asked for"))
    assert arrivals.refetch() == []
    chunks = [chunk for _ in range(2) for chunk in bench.chunk().chunks]
    assert [chunk.start for chunk in chunks] == [0, 8]
    written = [*chunks[0].pages[:3], *rooms[0].pages[:3], *rooms[1].pages[:3]]
    assert len(set(written)) == 9
    for room in rooms:
        admission.leave(room.slot, room.pages)
    bench.core.release_all()
    bench.cache.check(idle=True)


def test_who_finds_no_page_to_fetch_into_is_given_back():
    """The room that it gives back is for others, who may have done the same."""
    bench = Bench(pages=8)
    sequence = bench.ask(12)
    bench.store()
    bench.core.receive(m.Looked(sequence.id, [SHARED] * 3))
    plan = bench.store()
    assert plan is not None
    config = DecodeConfig(max_num_seqs=4, batch_buckets=[1])
    core = DecodeCore("decode0", bench.cache, model_specs(["decode0"]), config, 0, owns_cache=False)
    row = msgspec.structs.replace(sequence, id=99, prefill_worker="prefill1")
    core.receive(m.Covered(row, PromptUsage(13, 0, 12, 0)))
    assert core.schedule() is None
    assert core.inside_ids() == {99}
    left = bench.cache.allocate(bench.cache.num_available - 2)
    assert left is not None
    bench.core.receive(m.Loaded(plan.loads[0].transfer, "a page is not what was asked for"))
    core.schedule()
    assert core.inside_ids() == set()
    assert core.outbox == [
        ("prefill1", m.Release(99)),
        ("dispatcher", m.Returned(99, "preempted")),
    ]
    bench.cache.release(left)
    bench.core.release_all()
    bench.cache.check(idle=True)


@pytest.mark.parametrize("ends", ["lands", "is given up"])
def test_pages_that_follow_what_the_store_could_not_give(ends: str):
    """They leave the index with it, though a row of the pool is fetching them."""
    bench = Bench()
    sequence = bench.ask(16)
    bench.store()
    bench.core.receive(m.Looked(sequence.id, [SHARED] * 2))
    plan = bench.store()
    assert plan is not None
    admission, outbox = Admission(bench.cache, 4), []
    arrivals = Arrivals("decode0", bench.cache, outbox, iter(range(100, 200)))
    rows = [msgspec.structs.replace(sequence, id=id, order=id) for id in (98, 99)]
    rooms = [admission.reserve(row) for row in rows]
    for row, room in zip(rows, rooms, strict=True):
        assert room is not None
        arrivals.add(row, PromptUsage(17, 0, 16, 0), room)
    assert [message.pages for _, message in outbox] == [[2, 3]]
    bench.core.receive(m.Loaded(plan.loads[0].transfer, "a page is not what was asked for"))
    assert arrivals.refetch() == arrivals.complete() == []
    assert [message.pages for _, message in outbox[1:]] == [[0, 1], [0, 1, 2, 3]]
    if ends == "lands":
        for transfer in (100, 101, 102):
            arrivals.offered(transfer, [])
            arrivals.landed(transfer)
        assert [done.sequence.id for done in arrivals.complete()] == [98, 99]
    else:
        assert arrivals.remove(98) is not None
        assert arrivals.remove(99) is not None
    for room in rooms:
        assert room is not None
        admission.leave(room.slot, room.pages)
    bench.core.release_all()
    bench.cache.check(idle=True)


def test_rows_without_kv_move_too():
    """Of a prompt of one token nothing is covered, and a mesh may go before the first step."""
    host = Host(Setting(either=True, prefill=1, decode=2, decode_pages=40))
    replies = [
        host.submit(model, [i], 6) for i in range(2) for model in ("full", "identity", "lora")
    ]
    for _ in range(60):
        host.deliver_all()
        for name in ("prefill0", "decode1", "decode2"):
            host.work(name)
        rows = host.decode["decode2"].core.rows.all()
        if any(row.num_kv == 0 and row.planned == 0 for row in rows):
            break
    else:
        raise AssertionError("no row waited for its first step")
    assert host.give_mesh("prefill2")
    host.drain()
    for reply in replies:
        reply.check_ended()
        assert reply.reason is FinishReason.LENGTH


def test_a_row_may_enter_while_a_chunk_is_planned():
    """What is under way in the decode worker ends first, and gives a row of the pool room."""
    bench = Bench()
    sequence = bench.ask(20)
    bench.store()
    bench.core.receive(m.Looked(sequence.id, []))
    plan = bench.core.schedule(0.0)
    assert plan is not None
    assert [(chunk.start, len(chunk.tokens)) for chunk in plan.chunks] == [(0, 8)]
    admission = Admission(bench.cache, 4)
    room = admission.reserve(bench.prompt(12))
    assert room is not None
    assert sorted(room.arriving) == [0, 1, 2]
    bench.core.apply(plan, PrefillResult())
    assert bench.core.schedule(0.0) is None, "it waits for the third page"
    for number in (2, 1, 0):
        bench.cache.forget(room.arriving[number])
    while not bench.covered():
        bench.chunk()
    admission.leave(room.slot, room.pages)
    bench.core.receive(m.Release(sequence.id))
    bench.cache.check(idle=True)


def test_a_row_may_bring_the_page_that_a_prompt_is_filling_up():
    bench = Bench()
    first = bench.ask(6)
    bench.store()
    bench.core.receive(m.Looked(first.id, []))
    bench.chunk()
    assert bench.covered() == [first.id]
    sequence = bench.ask(12)
    bench.store()
    bench.core.receive(m.Looked(sequence.id, []))
    plan = bench.core.schedule(0.0)
    assert plan is not None
    assert [(chunk.start, len(chunk.tokens)) for chunk in plan.chunks] == [(6, 6)]
    admission = Admission(bench.cache, 4)
    room = admission.reserve(bench.prompt(8))
    assert room is not None
    assert sorted(room.arriving) == [1]
    bench.core.apply(plan, PrefillResult())
    assert bench.covered() == [sequence.id]
    room.arriving[1].state = PageState.READY
    assert bench.cache.matched_tokens(sequence.keys, sequence.prompt) == 8
    admission.leave(room.slot, room.pages)
    for id in (first.id, sequence.id):
        bench.core.receive(m.Release(id))
    bench.cache.check(idle=True)


def test_who_gave_way_does_not_come_back_before_the_one_that_needs_the_room():
    """Nor while that still waits for older ones, of which one is looked for in the store."""
    bench = Bench(pages=9)
    decode = DecodeCore(
        "decode0", bench.cache, model_specs(["decode0"]), DecodeConfig(), 0, owns_cache=False
    )
    pool = OnePool(bench.core, decode)
    oldest = bench.ask(12)
    assert bench.store() is not None
    second = msgspec.structs.replace(
        bench.prompt(8, seed=1), prompt=bench.prompt(23, seed=1).prompt
    )
    youngest = bench.prompt(12, seed=2)
    for sequence in (second, youngest):
        bench.core.receive(m.Prefill(sequence))
        bench.store()
        bench.core.receive(m.Looked(sequence.id, []))
        while not any(isinstance(message, m.Covered) for _, message in bench.core.outbox):
            bench.chunk()
        decode.receive(m.Covered(sequence, PromptUsage(0, 0, 0, 0)))
        assert bench.covered() == [sequence.id]
    assert pool.schedule_decode(0.0) is None
    assert [task.sequence.id for task in bench.core.queue.tasks] == [youngest.id]
    assert pool.schedule_prefill(0.0) is None
    assert [task.sequence.id for task in bench.core.queue.tasks] == [youngest.id]
    assert bench.core.loads() == {oldest.id: 12, youngest.id: 12}
    decode.receive(m.Abort(second.id))
    assert pool.schedule_prefill(0.0) is None, "it was covered before"
    assert bench.covered() == [youngest.id]
    bench.core.release_all()
    decode.release_all()
    bench.cache.check(idle=True)
