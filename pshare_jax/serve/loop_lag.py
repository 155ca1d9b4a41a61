"""How late the event loop is: what every client waits for, whatever it asked."""

from __future__ import annotations

import asyncio
import time

from pshare_jax.serve.metrics import Metrics

INTERVAL_SECONDS = 0.02
WINDOW_SECONDS = 60.0


class LoopLag:
    """Wakes up at even intervals and observes by how much too late it was.

    The gauge shows the greatest lag of the last one to two minutes, so that any scraper sees a
    stall; the histogram has them all. On a machine that does other things too, a lag tells of those
    as well; so the loop's own part of it is observed beside it: no more than the processor time
    that its thread has used since it woke up before.
    """

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._current = 0.0
        self._previous = 0.0
        self._window_end = self._loop.time() + WINDOW_SECONDS
        self._due = 0.0
        # Of the thread that wakes up, which is not known yet.
        self._used: float | None = None
        self._schedule()

    def close(self) -> None:
        """Stops."""
        self._handle.cancel()

    def _schedule(self) -> None:
        self._due = self._loop.time() + INTERVAL_SECONDS
        self._handle = self._loop.call_at(self._due, self._wake)

    def _wake(self) -> None:
        lag = max(0.0, self._loop.time() - self._due)
        if self._due > self._window_end:
            self._previous, self._current = self._current, 0.0
            self._window_end = self._due + WINDOW_SECONDS
        self._current = max(self._current, lag)
        used = time.thread_time()
        if self._used is not None:
            self._metrics.own_loop_lag.observe(min(lag, used - self._used))
        self._used = used
        self._metrics.loop_lag.observe(lag)
        self._metrics.max_loop_lag.set(max(self._current, self._previous))
        self._schedule()
