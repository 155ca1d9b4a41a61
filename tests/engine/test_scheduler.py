from __future__ import annotations

from dataclasses import dataclass

import pytest

from pshare_jax.engine.scheduler import (
    group_order,
    next_batch,
    next_prefill,
    preemption_victim,
    steps_for,
)


@dataclass(frozen=True)
class Work:
    order: int
    remaining: int = 0
    last_step: int = -1


def test_prefill_alternates_between_the_oldest_and_the_one_done_soonest() -> None:
    tasks = [Work(3, 5), Work(1, 100), Work(2, 5)]
    assert [next_prefill(tasks, turn).order for turn in range(4)] == [1, 2, 1, 2]


def test_groups_that_have_waited_longest_go_first() -> None:
    assert group_order(["a", "b", "c"], {"a": 5, "b": 3}) == ["c", "b", "a"]


def test_rows_that_have_waited_longest_go_first() -> None:
    rows = [Work(0, last_step=4), Work(1, last_step=2), Work(2, last_step=4), Work(3)]
    assert [row.order for row in next_batch(rows, 3)] == [3, 1, 0]
    assert [row.order for row in next_batch(rows, 9)] == [3, 1, 0, 2]


def test_no_row_starves_when_a_batch_cannot_hold_all() -> None:
    last = dict.fromkeys(range(10), -1)
    for tick in range(100):
        rows = [Work(order, last_step=step) for order, step in last.items()]
        for row in next_batch(rows, 4):
            last[row.order] = tick
        # Ten rows, four at a time: nobody waits for more than three others' turns.
        assert min(last.values()) >= tick - 3 or tick < 3


def test_the_youngest_is_preempted_and_never_an_older_one() -> None:
    rows = [Work(order) for order in (4, 2, 7, 5)]
    assert preemption_victim(rows, rows[0]) == Work(7)
    assert preemption_victim(rows, rows[1]) == Work(7)
    assert preemption_victim(rows, rows[2]) is None
    assert preemption_victim([rows[1]], rows[1]) is None


@pytest.mark.parametrize(
    ("remaining", "limit", "steps"), [([9, 3], 4, 3), ([9, 30], 4, 4), ([1], 4, 1), ([9], 1, 1)]
)
def test_no_row_runs_past_its_last_token(remaining: list[int], limit: int, steps: int) -> None:
    assert steps_for(remaining, limit) == steps
