"""Which rows of a batch are made a group."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pshare_jax.core.shared_runs import (
    REFRESH_DISPATCHES,
    RunSharing,
    SharedRuns,
    max_groups,
    shared_runs,
)

PAGE = 4
WIDTH = 8


def table_of(*rows: list[int]) -> np.ndarray:
    return np.asarray([row + [0] * (WIDTH - len(row)) for row in rows], np.int32)


def pages_read(position: int, window: int | None) -> range:
    """Numbers of the pages that a query at `position` sees."""
    first = 0 if window is None else max(position - window + 1, 0)
    return range(first // PAGE, position // PAGE + 1)


def groups_of(found: SharedRuns) -> dict[frozenset[int], int]:
    """Pages of the run of each group."""
    return {frozenset(m): pages for m, pages in zip(found.members, found.pages, strict=True)}


def test_rows_of_one_prompt_are_a_group_wherever_they_stand() -> None:
    table = table_of([7, 8, 1], [5, 6, 2], [7, 8, 3], [5, 9, 4], [7, 8, 10])
    found = shared_runs(table, [9, 10, 8, 11, 8], PAGE, limit=4)
    assert groups_of(found) == {frozenset({0, 2, 4}): 2, frozenset({1, 3}): 1}
    assert (found.plain_pages, found.saved_pages) == (15, 5)


def test_the_groups_that_save_most_are_kept() -> None:
    table = table_of([7, 8, 1], [7, 8, 2], [5, 3], [5, 4], [6, 9], [6, 10])
    found = shared_runs(table, [9, 9, 5, 5, 5, 5], PAGE, limit=1)
    assert [sorted(m) for m in found.members] == [[0, 1]]
    assert found.saved_pages == 2


def test_a_long_run_of_few_is_weighed_against_a_short_one_of_many() -> None:
    few_long = table_of([1, 2, 3, 4], [1, 2, 3, 5], [1, 6])
    assert shared_runs(few_long, [13, 13, 5], PAGE, 1).pages == (3,)
    many_short = table_of([1, 2, 3], [1, 2, 4], [1, 5], [1, 6], [1, 7])
    found = shared_runs(many_short, [9, 9, 5, 5, 5], PAGE, 1)
    assert (found.pages, found.saved_pages) == ((1,), 4)


def test_rows_around_a_group_with_a_longer_run_are_one() -> None:
    """Rows of one system prompt, between which some have a longer context in common."""
    table = table_of([2, 100], [2, 5, 101], [2, 8, 26, 102], [2, 8, 26, 103])
    found = shared_runs(table, [4, 8, 12, 12], PAGE, limit=2)
    assert groups_of(found) == {frozenset({2, 3}): 3, frozenset({0, 1}): 1}
    assert found.saved_pages == 4
    table = table_of(
        [1, 2, 3, 10], [1, 5], [1, 2, 3, 11], [1, 7], [1, 6, 8, 12], [1, 6, 8, 13], [1, 9]
    )
    found = shared_runs(table, [13, 5, 13, 5, 13, 13, 5], PAGE, limit=3)
    assert groups_of(found) == {frozenset({0, 2}): 3, frozenset({4, 5}): 3, frozenset({1, 3, 6}): 1}
    assert found.saved_pages == 8


def test_a_row_that_sees_more_may_go_with_a_shorter_run() -> None:
    """Row 0 has three pages in common with rows 2 and 3, but those see only the last of them."""
    table = table_of([1, 2, 3], [1, 2], [1, 2, 3], [1, 2, 3])
    table[:, 3:] = np.arange(50, 50 + table[:, 3:].size).reshape(4, -1)
    table[1, 2] = 40
    found = shared_runs(table, [16, 16, 24, 24], PAGE, limit=2, sliding_window=17)
    assert groups_of(found) == {frozenset({0, 1}): 2, frozenset({2, 3}): 3}
    assert found.saved_pages == 3


def test_pages_that_the_query_is_within_are_not_shared() -> None:
    table = table_of([1, 2], [1, 2])
    assert shared_runs(table, [7, 7], PAGE, 1).pages == (1,)
    assert shared_runs(table, [8, 8], PAGE, 1).pages == (2,)
    assert shared_runs(table, [3, 8], PAGE, 1).members == ()


def test_padding_pages_are_nobodys() -> None:
    assert shared_runs(np.zeros((4, WIDTH), np.int32), [3, 2, 1, 0], PAGE, 2).members == ()
    assert shared_runs(np.zeros((0, WIDTH), np.int32), [], PAGE, 2) == SharedRuns((), (), 0, 0)


def test_pages_before_a_window_save_nothing() -> None:
    table = table_of([1, 2, 3, 4], [1, 2, 3, 5])
    assert shared_runs(table, [12, 12], PAGE, 1, sliding_window=5).saved_pages == 1
    assert shared_runs(table, [12, 12], PAGE, 1, sliding_window=1).members == ()


def test_one_row_cannot_share() -> None:
    assert [max_groups(bucket) for bucket in (1, 2, 5, 64)] == [0, 1, 2, 8]


@st.composite
def batches(draw) -> tuple[np.ndarray, list[int]]:
    """Rows of one to four prompts, of which some begin alike; other pages are private."""
    count = draw(st.integers(1, 5))
    fresh = itertools.count(100)
    table, positions = np.zeros((count, WIDTH), np.int32), []
    for row in range(count):
        path = draw(st.lists(st.integers(1, 2), max_size=3))
        own = draw(st.integers(1, 3))
        pages = [sum(3**i * p for i, p in enumerate(path[: n + 1])) for n in range(len(path))]
        pages += [next(fresh) for _ in range(own)]
        table[row, : len(pages)] = pages
        positions.append(draw(st.integers(len(path) * PAGE, len(pages) * PAGE - 1)))
    return table, positions


def best_by_trying(table: np.ndarray, positions: list[int], limit: int, window: int | None) -> int:
    """Saved pages of the best of all partitions into groups."""

    def saved(group: tuple[int, ...]) -> int:
        run = 0
        while run < WIDTH and all(
            table[row, run] == table[group[0], run] and (run + 1) * PAGE <= positions[row]
            for row in group
        ):
            run += 1
        seen = [len([p for p in pages_read(positions[row], window) if p < run]) for row in group]
        return sum(seen) - max(seen)

    def best(rows: tuple[int, ...], groups: int) -> int:
        if not rows or not groups:
            return 0
        most = best(rows[1:], groups)
        for size in range(1, len(rows)):
            for others in itertools.combinations(rows[1:], size):
                rest = tuple(row for row in rows[1:] if row not in others)
                most = max(most, saved((rows[0], *others)) + best(rest, groups - 1))
        return most

    return best(tuple(range(len(positions))), limit)


@settings(max_examples=60, deadline=None)
@given(batch=batches(), limit=st.integers(1, 3), window=st.sampled_from([None, 1, 6, 11]))
def test_no_other_groups_save_more(batch, limit, window) -> None:
    table, positions = batch
    found = shared_runs(table, positions, PAGE, limit, window)
    plain = {(row, int(page)) for row, position in enumerate(positions)
             for page in pages_read(position, window)}  # fmt: skip
    assert found.plain_pages == len(plain)
    assert found.saved_pages == best_by_trying(table, positions, limit, window)
    assert len(found.members) <= limit
    seen = [row for group in found.members for row in group]
    assert len(seen) == len(set(seen))
    saved = 0
    for group, pages in zip(found.members, found.pages, strict=True):
        assert len({table[row, :pages].tobytes() for row in group}) == 1
        assert all(pages * PAGE <= positions[row] for row in group)
        reads = [len([p for p in pages_read(positions[row], window) if p < pages]) for row in group]
        saved += sum(reads) - max(reads)
    assert saved == found.saved_pages


def test_what_a_choice_takes_is_bounded_with_a_window_too() -> None:
    """Each row of 128 continues the one before it, and no two see the same first page."""
    count, prompt = 128, 1000
    table = np.zeros((count, prompt + count + 1), np.int32)
    positions = [(prompt + row) * PAGE for row in range(count)]
    for row in range(count):
        table[row, : prompt + row] = np.arange(1, prompt + row + 1)
    tracemalloc.start()
    found = shared_runs(table, positions, PAGE, 8, sliding_window=900 * PAGE)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20_000_000  # 200 million with a run for each pair of rows
    # One group of all would save what all see of the prompt, but for the first row.
    assert found.saved_pages > sum(prompt - (p // PAGE - 899) for p in positions[1:])


@pytest.mark.parametrize(("least_share", "groups"), [(0.0, 1), (0.25, 1), (0.26, 0)])
def test_little_to_save_is_left_alone(least_share: float, groups: int) -> None:
    sharing = RunSharing(PAGE, None, least_share)
    found = sharing.find("m", ["a", "b"], table_of([1, 2], [1, 3]), [7, 7], 1)
    assert (len(found.members), found.plain_pages) == (groups, 4)
    assert found.saved_pages == groups


def test_groups_are_remembered_for_a_batch_and_looked_for_again() -> None:
    sharing = RunSharing(PAGE, None, 0.0)
    shared, apart = table_of([1, 2], [1, 3]), table_of([1, 2], [4, 3])
    a, b, c = object(), object(), object()

    def find(name: str, batch: list[object], table: np.ndarray) -> int:
        return sharing.find(name, batch, table, [7, 7], 1).saved_pages

    assert find("m", [a, b], shared) == 1
    for _ in range(REFRESH_DISPATCHES - 1):
        assert find("m", [a, b], apart) == 1
    assert find("other", [a, b], apart) == 0
    assert find("m", [a, b], apart) == 0
    assert find("m", [a, c], shared) == 1
    assert find("m", [a], shared) == 1
