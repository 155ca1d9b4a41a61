"""Virtual time: events in order, processors that threads share, threads as generators."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Generator
from functools import partial

Action = Callable[[], None]
Work = Generator[float, None, bool]
"""One piece of a thread's work: yields seconds of computation, returns whether it got on."""


class Clock:
    """Virtual time, in seconds, and what will happen when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Action]] = []
        self._count = itertools.count()

    def at(self, time: float, action: Action) -> None:
        """Runs `action` at `time`; actions of one time run in the order in which they were set."""
        heapq.heappush(self._events, (max(time, self.now), next(self._count), action))

    def soon(self, action: Action) -> None:
        """Runs `action` now, after what runs at present."""
        self.at(self.now, action)

    def run(self) -> None:
        """Until nothing more will happen."""
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()


class Processor:
    """What computes for one or several threads, in equal shares.

    Args:
        clock: the time.
        overlap: work done a second while several threads compute, against one alone: 1 where each
            of them could use the whole processor, more where one leaves part of it idle, less where
            they hinder each other.
    """

    def __init__(self, clock: Clock, overlap: float = 1.0):
        self._clock = clock
        self._overlap = overlap
        self._jobs: dict[int, tuple[float, Action]] = {}
        self._since = 0.0
        self._version = 0
        self._count = itertools.count()

    def compute(self, seconds: float, done: Action) -> None:
        """Calls `done` when `seconds` of work are done."""
        self._settle()
        self._jobs[next(self._count)] = seconds, done
        self._plan()

    @property
    def _speed(self) -> float:
        count = len(self._jobs)
        return min(1.0, self._overlap / count) if count > 1 else 1.0

    def _settle(self) -> None:
        done = (self._clock.now - self._since) * self._speed
        self._jobs = {n: (left - done, action) for n, (left, action) in self._jobs.items()}
        self._since = self._clock.now

    def _plan(self) -> None:
        """Foresees the next end; a change of the jobs before that makes it void."""
        self._version += 1
        if self._jobs:
            number, (left, _) = min(self._jobs.items(), key=lambda item: item[1][0])
            time = self._clock.now + left / self._speed
            self._clock.at(time, partial(self._end, number, self._version))

    def _end(self, number: int, version: int) -> None:
        if version != self._version:
            return
        self._settle()
        _, done = self._jobs.pop(number)
        self._plan()
        done()


class Thread:
    """A thread that works while there is work, sleeps when there is none.

    Subclasses implement `work` as the engine's threads do.

    Attributes:
        busy_seconds: time in which it computed, on a shared processor the waiting included.
    """

    def __init__(self, clock: Clock, processor: Processor):
        self.busy_seconds = 0.0
        self._clock = clock
        self._processor = processor
        self._notified = False
        self._asleep = True
        self._program = self._loop()

    def work(self) -> Work:
        """One bounded piece of work."""
        raise NotImplementedError

    def notify(self) -> None:
        """Wakes the thread: there may be work."""
        self._notified = True
        if self._asleep:
            self._asleep = False
            self._clock.soon(self._resume)

    def _loop(self) -> Generator[float | None, None, None]:
        while True:
            self._notified = False
            if not (yield from self.work()) and not self._notified:
                yield None

    def _resume(self) -> None:
        seconds = next(self._program)
        if seconds is None:
            self._asleep = True
            return
        started = self._clock.now

        def done() -> None:
            self.busy_seconds += self._clock.now - started
            self._resume()

        self._processor.compute(seconds, done)
