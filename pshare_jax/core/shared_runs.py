"""Which rows of a decode batch begin with the same pages: pure policy on page tables, no jax.

Rows of any decode module hold the same pages where they share a prompt. Sorted by their page
tables, rows with a common prefix stand side by side, so that every group is an interval; the best
intervals are found by dynamic programming.
"""

# pyright: standard
# numpy does not say all of its types.

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pshare_jax.core.prefix_trie import best_prefixes, prefixes

MAX_GROUPS = 8
"""Most groups of one dispatch."""

LEAST_SHARE = 1 / 4
"""Share of the pages to be read that must be saved before runs are read apart from the rest.

Where unfinished softmaxes do not stay on the chip, the second pass and the merge move up to a
quarter of what 32 rows of 2,000 tokens read (docs/accelerators.md).
"""

REFRESH_DISPATCHES = 32
"""Dispatches after which the groups of an unchanged batch are looked for again.

They stay correct while the batch is the same, but a sliding window leaves a run behind.
"""


@dataclass(frozen=True)
class SharedRuns:
    """Groups of rows that share a run, and what reading each run once saves.

    `members[e]` are row numbers, `pages[e]` the number of first pages that they have in common.
    `plain_pages` would be read row by row; `saved_pages` fewer are with the groups.
    """

    members: tuple[tuple[int, ...], ...]
    pages: tuple[int, ...]
    plain_pages: int
    saved_pages: int


def max_groups(bucket: int) -> int:
    """Number of groups that a step of `bucket` rows is compiled for; 0 when it cannot share."""
    return min(MAX_GROUPS, bucket // 2)


def shared_runs(
    page_table: np.ndarray,
    positions: Sequence[int],
    page_size: int,
    limit: int,
    sliding_window: int | None = None,
) -> SharedRuns:
    """The at most `limit` groups that save the most pages; a row is in one group at most.

    Args:
        page_table: `[B, N]` int32.
        positions: of each row's query, B of them. Only pages that are full before it are shared.
        page_size: token slots of a page.
        limit: most groups.
        sliding_window: of the model; pages that it has passed save nothing.
    """
    query = np.asarray(positions, np.int64)
    window = query + 1 if sliding_window is None else sliding_window
    first = np.maximum(query - (window - 1), 0) // page_size
    plain = int((query // page_size + 1 - first).sum())

    table = np.array(page_table, np.int32)
    beyond = np.arange(table.shape[1]) >= (query // page_size)[:, None]
    # Unlike any page and any other row's: a common prefix ends here.
    table[beyond] = np.broadcast_to(-1 - np.arange(len(query))[:, None], table.shape)[beyond]
    # Any order will do in which equal prefixes stand together.
    order = np.array(sorted(range(len(query)), key=lambda row: table[row].tobytes()), int)
    common = _common_prefixes(table[order])
    if not common.any():
        return SharedRuns((), (), plain, 0)
    first = first[order]
    trie = prefixes(common.tolist())
    # Of each row, as they are sorted; those of deeper nodes come later.
    group = np.zeros(len(query), int)
    nodes = best_prefixes(trie, first, limit)
    for v in nodes:
        group[trie.start[v] : trie.end[v]] = v
    saved = 0
    for v in nodes:
        seen = np.maximum(trie.depth[v] - first[group == v], 0)
        saved += int(seen.sum() - seen.max())
    return SharedRuns(
        tuple(tuple(order[group == v].tolist()) for v in nodes),
        tuple(trie.depth[v] for v in nodes),
        plain,
        saved,
    )


def _common_prefixes(table: np.ndarray) -> np.ndarray:
    """Length of the common prefix of each row and the next, `[B - 1]`."""
    differs = table[1:] != table[:-1]
    return np.where(differs.any(axis=1), differs.argmax(axis=1), table.shape[1])


def _savings(common: np.ndarray, first: np.ndarray) -> np.ndarray:
    """`[B, B]`: pages saved when rows i .. j (i < j) are a group; 0 elsewhere.

    Row k sees the run's pages from `first[k]` on, and reads them itself when it is alone.
    """
    count = len(first)
    savings = np.zeros((count, count), np.int64)
    for i in np.flatnonzero(common):
        run = np.minimum.accumulate(common[i:])
        seen = np.maximum(run[:, None] - first[None, i:], 0)
        seen[np.arange(count - i)[None, :] > np.arange(1, count - i)[:, None]] = 0
        savings[i, i + 1 :] = seen.sum(axis=1) - seen.max(axis=1)
    return savings


def _best_intervals(savings: np.ndarray, limit: int) -> tuple[list[tuple[int, int]], int]:
    """At most `limit` intervals without a common row that save the most, and how much."""
    count = len(savings)
    # Intervals of one row, or of rows in the wrong order, are never the best.
    savings = np.where(np.tri(count, dtype=bool), -savings.sum() - 1, savings)
    # best[k][j] is what k intervals within the first j rows save at most.
    best = [np.zeros(count + 1, np.int64)]
    for _ in range(limit):
        fewer = best[-1]
        ending_here = (fewer[:count, None] + savings).max(axis=0)
        more = np.maximum.accumulate(np.maximum(fewer, [0, *ending_here]))
        if more[-1] == fewer[-1]:
            break
        best.append(more)
    intervals, j = [], count
    for k in range(len(best) - 1, 0, -1):
        while j > 0 and best[k][j] == best[k][j - 1]:
            j -= 1
        if best[k][j] > best[k - 1][j]:
            start = int((best[k - 1][:count] + savings[:, j - 1]).argmax())
            intervals.append((start, j - 1))
            j = start
    return intervals, int(best[-1][-1])


class RunSharing:
    """Groups for the dispatches of one engine, remembered while a batch stays the same.

    Args:
        page_size: token slots of a page.
        sliding_window: of the model.
        least_share: share of a batch's pages that must be saved.
    """

    def __init__(self, page_size: int, sliding_window: int | None, least_share: float):
        self._page_size = page_size
        self._window = sliding_window
        self._least_share = least_share
        self._found: dict[str, tuple[list[Any], int, SharedRuns]] = {}

    def find(
        self,
        name: str,
        batch: Sequence[Any],
        page_table: np.ndarray,
        positions: Sequence[int],
        limit: int,
    ) -> SharedRuns:
        """Groups of a batch, none where they save too little; see `shared_runs`.

        Args:
            name: of the group of models that the batch is of.
            batch: the rows' ids; a row that comes back with other pages has another one.
            page_table: see `shared_runs`.
            positions: see `shared_runs`.
            limit: see `shared_runs`.
        """
        rows, uses, found = self._found.get(name, ([], 0, SharedRuns((), (), 0, 0)))
        is_same = len(rows) == len(batch) and all(map(operator.eq, rows, batch))
        if not is_same or uses == REFRESH_DISPATCHES:
            found = shared_runs(page_table, positions, self._page_size, limit, self._window)
            if found.saved_pages < max(1, self._least_share * found.plain_pages):
                found = replace(found, members=(), pages=(), saved_pages=0)
            rows, uses = list(batch), 0
        self._found[name] = rows, uses + 1, found
        return found
