from __future__ import annotations

from dataclasses import dataclass

import pytest

from pshare_jax.core.scheduling import (
    GroupTurns,
    PrefillTurns,
    next_batch,
    steps_for,
)


@dataclass(frozen=True)
class Work:
    order: int
    remaining: int = 0
    last_step: int = -1
    started: bool = True


OLD, NEW = Work(0), Work(0, started=False)


def steps(turns: GroupTurns, ready: dict[str, list[Work]], count: int) -> str:
    """The groups of the next `count` steps; a row has started once its group has had a step."""
    taken = ""
    for _ in range(count):
        group = turns.order(ready)[0]
        turns.stepped(group, ready)
        ready[group] = [OLD] * len(ready[group])
        taken += group
    return taken


def test_prefill_alternates_between_the_fair_choice_and_the_one_done_soonest() -> None:
    turns, tasks = PrefillTurns(), [Work(3, 5), Work(1, 100), Work(2, 5)]
    assert [turns.next(tasks, tasks[1], short=4).order for _ in range(4)] == [1, 2, 1, 2]
    assert turns.next([], tasks[0], short=4) is tasks[0]


def test_a_short_prompt_does_not_wait_for_a_shares_turn_but_shares_get_theirs() -> None:
    turns, short, long = PrefillTurns(), Work(3, 4), Work(1, 100)
    taken = [turns.next([short, long], long, short=4).order for _ in range(7)]
    assert taken == [3, 1, 3, 3, 1, 3, 3], "of three turns one is the share's"
    # Nothing passes the shares that is not near enough to be looked at.
    assert turns.next([long], long, short=4) is long


def test_with_a_quantum_of_one_groups_take_steps_in_turn() -> None:
    turns = GroupTurns(1)
    ready = {"a": [OLD], "b": [OLD] * 5, "c": [NEW]}
    assert steps(turns, ready, 7) == "abcabca"
    assert turns.order({"a": [OLD], "c": [OLD]}) == ["c", "a"]


def test_a_group_goes_on_for_a_quantum() -> None:
    assert steps(GroupTurns(4), {"a": [OLD], "b": [OLD]}, 12) == "aaaabbbbaaaa"
    # One alone has turn after turn; when its rows have ended the next begins at once.
    turns = GroupTurns(4)
    assert steps(turns, {"a": [OLD]}, 6) == "aaaaaa"
    assert steps(turns, {"b": [OLD], "c": [OLD]}, 5) == "bbbbc"


def test_the_group_with_most_rows_is_next_but_none_starves() -> None:
    turns = GroupTurns(4)
    ready = {"a": [OLD], "b": [OLD] * 2, "c": [OLD] * 3}
    assert steps(turns, ready, 12) == "aaaabbbbcccc"  # none has had a step before
    # After three quanta less a step for each, a and b come before c's rows.
    assert steps(turns, ready, 48) == "ccccaaaabbbbcccc" * 3


def test_a_turn_is_over_where_another_group_may_be_chosen() -> None:
    turns = GroupTurns(2)
    both, one = {"a": [OLD], "b": [OLD]}, {"a": [OLD]}
    assert turns.is_over(both)  # nobody has the turn yet
    assert steps(turns, both, 1) == "a"
    assert not turns.is_over(both)
    assert turns.is_over({"b": [OLD]})
    assert steps(turns, both, 1) == "a"
    assert turns.is_over(both)
    assert not turns.is_over(one)  # there is nobody to choose from
    assert not GroupTurns(1).is_over(both)  # whoever has waited longest is known at once


def test_new_rows_get_every_second_step_at_most() -> None:
    turns = GroupTurns(4)
    ready = {"a": [OLD], "b": [OLD], "c": [OLD]}
    assert steps(turns, ready, 13) == "aaaabbbbcccca"
    ready |= {"b": [OLD, NEW], "c": [NEW]}
    # Both get a first token between a's steps, and a still has its whole turn.
    assert steps(turns, ready, 5) == "bacaa"
    turns, ready, taken = GroupTurns(4), {"a": [OLD], "b": [OLD]}, ""
    for _ in range(16):
        ready["b"] = [NEW]
        taken += steps(turns, ready, 1)
    assert taken == "abababa" + "bbbb" + "abab" + "a"


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


@pytest.mark.parametrize(
    ("remaining", "limit", "steps"), [([9, 3], 4, 3), ([9, 30], 4, 4), ([1], 4, 1), ([9], 1, 1)]
)
def test_no_row_runs_past_its_last_token(remaining: list[int], limit: int, steps: int) -> None:
    assert steps_for(remaining, limit) == steps
