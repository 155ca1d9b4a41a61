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

MOST_RUNS = 500
"""Runs of a batch (see `_Runs`) from which on each further node has only that which all rows see.

Random prefixes within prefixes of 64 rows have up to 250 with a sliding window.
"""

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


def best_prefixes(trie: Prefixes, first: np.ndarray, limit: int) -> list[tuple[int, int]]:
    """At most `limit` nodes that save the most, each with the first page of it that is read.

    A row goes with the last node returned that has it and that is read from where the row begins
    to see, or earlier. A node saves what its rows see of the prefix together, less the most that
    one of them sees. A node comes after those above it.

    No other groups of rows save more, and every node returned saves something, while there are
    fewer than `MOST_RUNS` runs. Where all rows see page 0 there are as many runs as nodes, and no
    limit. Beyond it, further nodes are read from the first page that any of their rows sees, so
    groups may be missed without the rows that see pages before the others.

    Args:
        trie: of B rows.
        first: `[B]` int64, first page that each row sees.
        limit: most nodes.
    """
    return _Choice(trie, _Runs(trie, first), limit).best()


class _Runs:
    """What the choice of one node can mean for the rows.

    A run is a node with the first page of it that is read, so that what it costs does not depend
    on what is chosen below. Rows of the node that see an earlier page go with a run further down,
    fall to the run above, or are alone. Run 0 is none.

    Attributes:
        saved: `[S, B]` int64, pages that each row sees of the run, or of the one that it falls to.
        cost: `[S]` int64, pages that are read once.
        since: first page read of each.
        above: run that rows fall to from each, 0 for none.
        plain: of each node its runs from which no row falls; they may be below any run.
        falling: of each node its other runs.
    """

    def __init__(self, trie: Prefixes, first: np.ndarray):
        self.since, self.above = [0], [0]
        self.plain, self.falling = [slice(1)], [slice(0)]
        self._first = first
        self._saved = [np.zeros_like(first)]
        depth, upper = [0], [[]]
        for v in range(1, len(trie.start)):
            begin, pages = len(self.since), trie.depth[v]
            rows, above = slice(trie.start[v], trie.end[v]), upper[trie.parent[v]]
            # A run from the last of these on has one row. Without a window all are page 0.
            starts = sorted(page for page in first[rows].tolist() if page < pages)[:-1]
            starts = list(dict.fromkeys(starts))
            if len(self.since) >= MOST_RUNS:
                starts = starts[:1]
            seen = np.maximum(pages - first, 0)
            for since in starts:
                self._add(since, 0, seen)
            middle = len(self.since)
            if above and len(starts) > 1 and middle < MOST_RUNS:
                self._add_falling(starts, above, rows, seen, pages)
            end = len(self.since)
            self.plain.append(slice(begin, middle))
            self.falling.append(slice(middle, end))
            upper.append([*above, *range(begin, end)])
            depth += [pages] * (end - begin)
        self.saved = np.array(self._saved)
        self.cost = np.array(depth) - self.since

    def _add(self, since: int, above: int, seen: np.ndarray) -> None:
        self.since.append(since)
        self.above.append(above)
        self._saved.append(np.where(self._first >= since, seen, self._saved[above]))

    def _add_falling(
        self, starts: list[int], above: list[int], rows: slice, seen: np.ndarray, pages: int
    ) -> None:
        """Adds runs of one node for the runs above that it can be best to fall to.

        If the earliest row that falls saves no more there than this run costs, the run can as well
        begin where that row does.
        """
        saved = np.array([self._saved[s][rows] for s in above])
        for since in starts[1:]:
            most = saved[:, self._first[rows] < since].max(axis=1)
            room = MOST_RUNS - len(self.since)
            for i in np.flatnonzero(most > pages - since)[:room]:
                self._add(since, above[i], seen)


class _Choice:
    """The dynamic program: tables from the leaves up, then the choice from the root down.

    Table `_whole[v]` is `[S, K]` int64: what the rows of node v save at most with run s nearest
    above it and k nodes chosen among v and those below. `_within[v]` is that with v not chosen,
    `_before[v]` that of v's parent without v and the children that come before it.
    """

    def __init__(self, trie: Prefixes, runs: _Runs, limit: int):
        self._trie = trie
        self._runs = runs
        own: list[list[int]] = [[] for _ in trie.start]
        for row, v in enumerate(trie.deepest):
            own[v].append(row)
        self._within = [runs.saved[:, rows].sum(axis=1, keepdims=True) for rows in own]
        self._whole, self._before = list(self._within), list(self._within)
        for v in range(len(own) - 1, 0, -1):
            up = trie.parent[v]
            self._whole[v] = self._with_choice(v)[:, : limit + 1]
            self._before[v] = self._within[up]
            self._within[up] = _best_sums(self._before[v], self._whole[v])[:, : limit + 1]

    def _with_choice(self, v: int) -> np.ndarray:
        """`_whole[v]` from `_within[v]`."""
        within, plain = self._within[v], self._runs.plain[v]
        if plain.start == plain.stop:
            return within
        whole = np.full((len(within), within.shape[1] + 1), _NEVER)
        whole[:, :-1] = within
        chosen = whole[:, 1:]
        np.maximum(chosen, self._chosen(v, plain).max(axis=0), out=chosen)
        falling = self._runs.falling[v]
        np.maximum.at(chosen, self._runs.above[falling], self._chosen(v, falling))
        return whole

    def _chosen(self, v: int, runs: slice) -> np.ndarray:
        """`[runs, K]`: what the rows of v save at most by each of its runs and k nodes below."""
        return self._within[v][runs] - self._runs.cost[runs, None]

    def best(self) -> list[tuple[int, int]]:
        """See `best_prefixes`."""
        count = len(self._trie.parent)
        best, left, run = [], [0] * count, [0] * count
        # The first maximum: a node that saves nothing is not chosen.
        left[0] = int(self._within[0][0].argmax())
        for v in range(1, count):
            up = self._trie.parent[v]
            s, k = run[up], left[up]
            left[up] = _first_part(self._before[v][s], self._whole[v][s], k)
            k -= left[up]
            within = self._within[v][s]
            if k and (k == len(within) or self._whole[v][s, k] > within[k]):
                k -= 1
                s = self._best_run(v, s, k)
                best.append((v, self._runs.since[s]))
            left[v], run[v] = k, s
        return best

    def _best_run(self, v: int, above: int, below: int) -> int:
        """The run of v to choose below run `above` when `below` nodes are chosen below v."""
        plain, falling = self._runs.plain[v], self._runs.falling[v]
        runs = [*range(plain.start, plain.stop)]
        runs += [s for s in range(falling.start, falling.stop) if self._runs.above[s] == above]
        return max(runs, key=lambda s: self._within[v][s, below] - self._runs.cost[s])


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
