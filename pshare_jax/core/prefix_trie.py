"""Which common prefixes of rows save the most when each is read once: a choice of nodes of a trie.

Only nodes where rows part are looked at, fewer than there are rows: at any other node the same rows
have a longer prefix in common.
"""

# pyright: standard
# numpy does not say all of its types.

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

_NEVER = np.iinfo(np.int64).min // 4


@dataclass(frozen=True)
class Prefixes:
    """Nodes of the trie of sorted rows, each after the one above it.

    The rows `start[v] .. end[v] - 1` have their first `depth[v]` pages in common; `parent[v]` is
    the node above, `deepest[row]` the last node of a row. Node 0 has all rows and no page.
    """

    start: list[int]
    end: list[int]
    depth: list[int]
    parent: list[int]
    deepest: list[int]


def prefixes(common: list[int]) -> Prefixes:
    """The trie of one row or more.

    Args:
        common: pages that each of the sorted rows, but for the last, has in common with the next.
    """
    count = len(common) + 1
    trie = Prefixes([], [], [], [], [0] * count)
    found = [(0, count, 0, 0)]
    while found:
        start, end, depth, parent = found.pop()
        node = len(trie.start)
        trie.start.append(start)
        trie.end.append(end)
        trie.depth.append(depth)
        trie.parent.append(parent)
        trie.deepest[start:end] = [node] * (end - start)
        parts = [i + 1 for i in range(start, end - 1) if common[i] == depth]
        for i, j in itertools.pairwise([start, *parts, end]):
            if j - i > 1:
                found.append((i, j, min(common[i : j - 1]), node))
    return trie


def best_prefixes(trie: Prefixes, first: np.ndarray, limit: int) -> list[int]:
    """At most `limit` nodes that save the most when each row goes with the last that has it.

    What a node saves is what its rows see of the prefix, less the most that one of them sees.
    Every node returned saves something, and comes after those above it.

    Args:
        trie: of B rows.
        first: `[B]` int64, first page that each row sees.
        limit: most nodes.
    """
    return _Choice(trie, first, limit).nodes()


class _Choice:
    """The dynamic program: tables from the leaves up, then the choice from the root down.

    A run is a chosen node with the first page of it that is read. Rows that see an earlier page
    are no members: they are in runs further down, or alone. So what a run costs does not depend on
    what is chosen below it. Run 0 is none.

    Table `_whole[v]` is `[runs, choices]`: what the rows of node v save at most with run s nearest
    above it and k nodes chosen among v and those below. `_within[v]` is that with v not chosen,
    `_before[v]` that of v's parent without v and the children that come before it.
    """

    def __init__(self, trie: Prefixes, first: np.ndarray, limit: int):
        self._parent = trie.parent
        self._runs: list[slice] = []
        depth, since = [], []
        for start, end, pages in zip(trie.start, trie.end, trie.depth, strict=True):
            starts = {min(page, pages) for page in first[start:end].tolist()}
            self._runs.append(slice(len(since), len(since) + len(starts)))
            since += starts
            depth += [pages] * len(starts)
        depth, since = np.array(depth)[:, None], np.array(since)[:, None]
        self._cost = depth - since
        saved = np.where(first >= since, np.maximum(depth - first, 0), 0)

        own = [[] for _ in trie.start]
        for row, v in enumerate(trie.deepest):
            own[v].append(row)
        self._within = [saved[:, rows].sum(axis=1, keepdims=True) for rows in own]
        self._whole, self._before = list(self._within), list(self._within)
        for v in range(len(own) - 1, 0, -1):
            within, up = self._within[v], trie.parent[v]
            whole = np.pad(within, ((0, 0), (0, 1)), constant_values=_NEVER)
            whole[:, 1:] = np.maximum(whole[:, 1:], self._chosen(v).max(axis=0))
            self._whole[v] = whole[:, : limit + 1]
            self._before[v] = self._within[up]
            self._within[up] = _best_sums(self._before[v], self._whole[v])[:, : limit + 1]

    def _chosen(self, v: int) -> np.ndarray:
        """`[runs of v, choices below v]`: what the rows of v save at most with v chosen."""
        return self._within[v][self._runs[v]] - self._cost[self._runs[v]]

    def nodes(self) -> list[int]:
        """See `best_prefixes`."""
        count = len(self._parent)
        nodes, left, run = [], [0] * count, [0] * count
        left[0] = int(self._within[0][0].argmax())
        for v in range(1, count):
            up = self._parent[v]
            s, k = run[up], left[up]
            left[up] = _first_part(self._before[v][s], self._whole[v][s], k)
            k -= left[up]
            if k and (k == self._within[v].shape[1] or self._whole[v][s, k] > self._within[v][s, k]):
                k -= 1
                s = self._runs[v].start + int(self._chosen(v)[:, k].argmax())
                nodes.append(v)
            left[v], run[v] = k, s
        return nodes


def _best_sums(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`[S, I + J - 1]`: column k is the largest `a[:, i] + b[:, k - i]` of each row."""
    if a.shape[1] > b.shape[1]:
        a, b = b, a
    parts, width = a.shape[1], b.shape[1]
    sums = np.full((len(a), parts + width - 1), 2 * _NEVER)
    for i in range(parts):
        part = sums[:, i : i + width]
        np.maximum(part, a[:, i, None] + b, out=part)
    return sums


def _first_part(a: np.ndarray, b: np.ndarray, k: int) -> int:
    """The i of the largest `a[i] + b[k - i]`."""
    options = range(max(k - len(b) + 1, 0), min(k, len(a) - 1) + 1)
    return max(options, key=lambda i: a[i] + b[k - i])
