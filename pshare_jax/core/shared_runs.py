"""Which rows of a decode batch begin with the same pages: pure policy on page tables, no jax.

Rows of any decode module hold the same pages where they share a prompt. The prefixes that they have
in common are a trie, of which the best nodes are chosen (`prefix_trie`). A group's run may be the
beginning of another's: the rows of one system prompt, but for those with a longer context together.
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

    Exact without a sliding window: no other groups save more. With one it is exact too, but for
    batches of more than `prefix_trie.MOST_RUNS` runs, where some choices are not looked at; what
    is said to be saved is always what these groups save. Every group has two rows or more that
    see pages of its run, and saves something.

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
    nodes = best_prefixes(trie, first, limit)
    # The node of each sorted row; deeper ones come later.
    group = np.zeros(len(query), int)
    for v, since in nodes:
        rows = slice(trie.start[v], trie.end[v])
        group[rows][(first[rows] >= since) & (first[rows] < trie.depth[v])] = v
    members, pages, saved = [], [], 0
    for v, _ in nodes:
        seen = trie.depth[v] - first[group == v]
        fewer = int(seen.sum() - seen.max(initial=0))
        # Past `MOST_RUNS` a node may be chosen in vain.
        if fewer:
            members.append(tuple(order[group == v].tolist()))
            pages.append(trie.depth[v])
            saved += fewer
    return SharedRuns(tuple(members), tuple(pages), plain, saved)


def _common_prefixes(table: np.ndarray) -> np.ndarray:
    """Length of the common prefix of each row and the next, `[B - 1]`."""
    differs = table[1:] != table[:-1]
    return np.where(differs.any(axis=1), differs.argmax(axis=1), table.shape[1])


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
