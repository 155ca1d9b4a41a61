"""Virtual time: events in order, and processors that compute one thing at a time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

Action = Callable[[], None]


class Clock:
    """Virtual time, in seconds, and what will happen when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Action]] = []
        self._count = itertools.count()

    def at(self, time: float, action: Action) -> None:
        """Runs `action` at `time`; actions of one time run in the order in which they were set."""
        heapq.heappush(self._events, (max(time, self.now), next(self._count), action))

    def run(self) -> None:
        """Until nothing more will happen."""
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()


class Processor:
    """What computes for the workers of one host: at once what it is given, in order.

    Attributes:
        now: the time that the host has come to.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._free = 0.0

    def compute(self, seconds: float) -> float:
        """Begins work after what was begun before; when it will be done."""
        self._free = max(self._free, self.now) + seconds
        return self._free

    def wait(self, time: float) -> None:
        """The host does nothing until `time`."""
        self.now = max(self.now, time)
