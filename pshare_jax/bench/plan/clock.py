"""Virtual time: events in order, processors on which threads take turns, threads as generators."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Generator

from pshare_jax.core.fairness import FairQueue, Share

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
    """What computes for one or several threads, which take turns as the engine's do."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._queue: FairQueue[Share] = FairQueue()
        self._calls: dict[Share, Action] = {}

    def take(self, share: Share, call: Action) -> bool:
        """Whether it is the share's turn at once; if not, `call` runs when it is."""
        if self._queue.take(share):
            return True
        self._calls[share] = call
        return False

    def end(self, share: Share, seconds: float, *, more: bool) -> bool:
        """Ends a piece of work; whether the share's thread may go on, see `FairQueue.end`."""
        following = self._queue.end(share, seconds, more=more)
        if following is not None and following is not share:
            self._clock.soon(self._calls.pop(following))
        return following is share


class Thread:
    """A thread that works while there is work and it is its turn, sleeps when there is none.

    Subclasses implement `work` as the engine's threads do.

    Args:
        clock: the time.
        processor: what computes its work.
        weight: its share of the processor.

    Attributes:
        busy_seconds: time in which it computed.
    """

    def __init__(self, clock: Clock, processor: Processor, weight: float = 1.0):
        self.busy_seconds = 0.0
        self._clock = clock
        self._processor = processor
        self._share = Share(weight)
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
        """Yields seconds of computation, or None to be resumed by somebody else."""
        while True:
            if not self._processor.take(self._share, self._resume):
                yield None
            progress = yield from self._take_turn()
            if not progress and not self._notified:
                self._asleep = True
                yield None

    def _take_turn(self) -> Work:
        """Works as long as it is its turn; False when there was nothing to do."""
        while True:
            self._notified = False
            before = self.busy_seconds
            progress = yield from self.work()
            seconds = self.busy_seconds - before
            if not self._processor.end(self._share, seconds, more=progress):
                return progress

    def _resume(self) -> None:
        seconds = next(self._program)
        if seconds is not None:
            self.busy_seconds += seconds
            self._clock.at(self._clock.now + seconds, self._resume)
