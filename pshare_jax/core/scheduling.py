"""Scheduling policy: what waits and runs in, what is next out. No jax, no threads."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

PREFILL_WEIGHT, DECODE_WEIGHT = 4.0, 1.0
"""Shares of a processor on which engines take turns. A decode step with more rows costs little
more, so rows had better be there early."""

_PATIENCE = 3
"""Quanta after which a group of models goes before those with more rows."""


class PrefillWork(Protocol):
    """What the prefill policy looks at: arrival order, and prompt tokens still to be covered."""

    @property
    def order(self) -> int: ...  # noqa: D102

    @property
    def remaining(self) -> int: ...  # noqa: D102


class DecodeWork(Protocol):
    """What the decode policy looks at: arrival order, the tick of the last dispatch, and whether
    there is a token of it."""

    @property
    def order(self) -> int: ...  # noqa: D102

    @property
    def last_step(self) -> int: ...  # noqa: D102

    @property
    def started(self) -> bool: ...  # noqa: D102


P = TypeVar("P", bound=PrefillWork)
D = TypeVar("D", bound=DecodeWork)


class PrefillTurns:
    """Whose chunk is computed next.

    Turns alternate between the task whose share says so, so that none starves, and the one that is
    done soonest, so that a short prompt does not wait for a long one. One that is done with a piece
    of a chunk does not wait for a share's turn either; but each turn of a share is put off by one
    of them at most, so that shares choose every third time at least.
    """

    def __init__(self) -> None:
        self._turn = 0
        self._passed = False

    def next(self, near: Sequence[P], fair: P, short: int) -> P:
        """The task that gets the turn.

        Args:
            near: tasks whose shares are not far ahead.
            fair: whom the shares choose.
            short: tokens that are computed in a small part of a chunk's time.
        """
        soonest = min(near, key=lambda task: (task.remaining, task.order), default=fair)
        is_fair = self._turn % 2 == 0
        self._passed = is_fair and not self._passed and soonest.remaining <= short
        if self._passed:
            return soonest
        self._turn += 1
        return fair if is_fair else soonest


class GroupTurns:
    """Which group of models decodes next.

    A step reads a group's weights, whatever its rows, so groups had better have many rows. One that
    has begun goes on for a quantum of steps; meanwhile rows of the others gather, and rows that are
    stepped together end together and come back together. Then the group with most rows is next,
    but one that has waited for some quanta comes before. Rows that have no token yet do not wait
    for the end of a turn: their group gets every second step. So no group waits for ever.

    Args:
        quantum: steps of a turn; 1 is a step for each group, the longest waiting first.
    """

    def __init__(self, quantum: int):
        self._quantum = quantum
        # With a quantum of 1 every group has waited long enough.
        self._patience = _PATIENCE * (quantum - 1)
        self._group: str | None = None
        self._steps = 0
        self._interrupted = False
        self._tick = 0
        self._last_step: dict[str, int] = {}

    def is_over(self, ready: Mapping[str, Sequence[DecodeWork]]) -> bool:
        """Whether one of several groups is to be chosen for a turn, by what is ready.

        That had better wait for the results of steps under way, whose rows come back with more.
        """
        others = ready.keys() - {self._group}
        return self._quantum > 1 and bool(others) and not self._goes_on(ready)

    def order(self, ready: Mapping[str, Sequence[DecodeWork]]) -> list[str]:
        """The groups of `ready`, by their rows, in the order in which they should get a step."""
        waiting = sorted(ready, key=lambda group: self._last_step.get(group, -1))
        if self._group is None or not self._goes_on(ready):
            return sorted(waiting, key=lambda group: self._claim(group, ready))
        first = [self._group]
        if not self._interrupted:
            new = (g for g in waiting if not all(row.started for row in ready[g]))
            first = [*itertools.islice(new, 1), *first]
        return list(dict.fromkeys([*first, *waiting]))

    def stepped(self, group: str, ready: Mapping[str, Sequence[DecodeWork]]) -> None:
        """`group` has got a step; `ready` is what its place in the order was taken from."""
        self._tick += 1
        self._last_step[group] = self._tick
        if not self._goes_on(ready):
            self._group, self._steps, self._interrupted = group, 1, False
        elif group == self._group:
            self._steps, self._interrupted = self._steps + 1, False
        else:
            self._interrupted = True

    def _goes_on(self, ready: Mapping[str, Sequence[DecodeWork]]) -> bool:
        return self._group in ready and self._steps < self._quantum

    def _claim(self, group: str, ready: Mapping[str, Sequence[DecodeWork]]) -> int:
        """The smaller, the sooner, among groups that are sorted by how long they have waited."""
        if group not in self._last_step:
            return -sys.maxsize
        waited = self._tick - self._last_step[group]
        return -sys.maxsize if waited >= self._patience else -len(ready[group])


def next_batch(rows: Sequence[D], limit: int) -> list[D]:
    """At most `limit` rows: those that have waited longest, oldest first among equals."""
    return sorted(rows, key=lambda row: (row.last_step, row.order))[:limit]


def steps_for(remaining: Sequence[int], limit: int) -> int:
    """Tokens generated by one dispatch: no row may run past its last one."""
    return max(1, min(limit, *remaining))
