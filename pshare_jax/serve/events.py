"""Carries the engine threads' events to the event loop, many with one wake-up."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from pshare_jax.core.requests import Request, RequestOutput
from pshare_jax.serve.engine_api import Sink, Submitter
from pshare_jax.serve.turns import Turn

BATCH = 32


@dataclass(frozen=True)
class Event:
    """An engine event of sequence `index` of an HTTP request, and when it happened.

    `time` is in seconds of `time.monotonic`.
    """

    index: int
    output: RequestOutput
    time: float


Receiver = Callable[[Event], None]


class EventBridge:
    """One queue for all requests. `put` may be called from any thread, and never blocks.

    Waking an event loop costs a system call; so only the first event after a delivery does it, and
    the delivery takes everything that has come by then.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._events: deque[tuple[Receiver, Event]] = deque()
        self._scheduled = False

    def put(self, receiver: Receiver, index: int, output: RequestOutput) -> None:
        """Has `receiver` called with the event, on the loop."""
        self._events.append((receiver, Event(index, output, time.monotonic())))
        if not self._scheduled:
            self._scheduled = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed: nobody waits any more
                self._events.clear()

    def _deliver(self) -> None:
        # Cleared first: an event that is put from now on either is seen below or wakes again.
        self._scheduled = False
        while self._events:
            receiver, event = self._events.popleft()
            receiver(event)


class Generation:
    """The sequences of one HTTP request, from submission to the last one's end.

    A context manager: entering submits every sequence (or none, if one is refused), leaving aborts
    those that still run. Many sequences, and many events, let others of the loop have their turn.
    """

    def __init__(self, engine: Submitter, bridge: EventBridge, requests: Sequence[Request]):
        self._engine = engine
        self._bridge = bridge
        self._requests = requests
        self._running: set[int] = set()
        self._events: list[Event] = []
        self._wakeup = asyncio.Event()

    async def __aenter__(self) -> Generation:
        turn = Turn()
        try:
            for index, request in enumerate(self._requests):
                # Known as running first: its events may come before submit returns.
                self._running.add(index)
                self._engine.submit(request, self._sink(index))
                await turn.pause()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for index in list(self._running):
            self.abort(index)

    def abort(self, index: int, *, complete: bool = False) -> None:
        """Ends sequence `index`; its further events are dropped. Idempotent.

        `complete` says that it was cut where it was to end.
        """
        if index in self._running:
            self._running.discard(index)
            self._engine.abort(self._requests[index].id, complete=complete)

    async def batches(self, patience: float | None = None) -> AsyncIterator[list[Event]]:
        """The events that have come since the last batch, until no sequence runs.

        After `patience` seconds without any the batch is empty; None waits for ever.
        """
        while self._running or self._events:
            if not self._events:
                self._wakeup.clear()
                try:
                    async with asyncio.timeout(patience):
                        await self._wakeup.wait()
                except TimeoutError:
                    yield []
                    continue
            events, self._events = self._events[:BATCH], self._events[BATCH:]
            yield events
            if self._events:
                await asyncio.sleep(0)

    def _sink(self, index: int) -> Sink:
        return lambda output: self._bridge.put(self._receive, index, output)

    def _receive(self, event: Event) -> None:
        if event.index not in self._running:
            return
        if event.output.finish_reason is not None:
            self._running.discard(event.index)
        self._events.append(event)
        self._wakeup.set()
