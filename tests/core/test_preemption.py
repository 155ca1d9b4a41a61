"""Who gives way in a decode core when pages run out, message by message, without executor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pshare_jax.core import messages as m
from pshare_jax.core.plans import Landed
from tests.core.decode_bench import STEPS, Bench, decode_bench, sequence, step_rows


@pytest.fixture
def bench() -> Iterator[Bench]:
    with decode_bench() as bench:
        yield bench


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
