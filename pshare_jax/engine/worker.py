"""A thread that works while there is work, sleeps when there is none, and says so when it dies."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from pshare_jax.engine.turns import Member, Turns

logger = logging.getLogger(__name__)


class Worker:
    """Runs `work()` in a thread of its own until stopped.

    Subclasses implement `work`, which does one bounded piece and returns whether it made
    progress; after a fruitless one the thread sleeps until `notify`. An exception ends the
    thread and calls `on_dead(reason)`.

    Attributes:
        busy_seconds: time spent in pieces of work that made progress; written by the thread alone.

    Args:
        name: of the thread.
        on_dead: called with the reason when the thread fails.
        weight: its share of a processor that workers take turns on, see `share_processor`.
    """

    def __init__(self, name: str, on_dead: Callable[[str], None], weight: float = 1.0):
        self.name = name
        self.busy_seconds = 0.0
        self._member = Member(weight)
        self._turns = Turns()
        self._on_dead = on_dead
        self._condition = threading.Condition()
        self._notified = False
        self._stopping = False
        self._thread: threading.Thread | None = None

    def work(self) -> bool:
        """One bounded piece of work; False when there was nothing to do."""
        raise NotImplementedError

    def setup(self) -> None:
        """Called once in the thread, before the first piece of work."""

    def share_processor(self, turns: Turns) -> None:
        """Works from the start on only when it is its turn."""
        self._turns = turns

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """Wakes the thread: there may be work."""
        with self._condition:
            self._notified = True
            self._condition.notify()

    def stop(self) -> None:
        """Ends the thread after its present piece of work and waits for it."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            self.setup()
            while not self._stopping:
                if not self._take_turn():
                    self._sleep()
        except BaseException as error:
            logger.exception("%s has failed", self.name)
            self._on_dead(f"{self.name}: {type(error).__name__}: {error}")

    def _take_turn(self) -> bool:
        """Works as long as it is its turn; False when there was nothing to do."""
        self._turns.take(self._member)
        while True:
            started, progress = time.perf_counter(), False
            try:
                progress = self.work()
            finally:
                seconds = time.perf_counter() - started
                more = self._turns.end(self._member, seconds, more=progress and not self._stopping)
            if progress:
                self.busy_seconds += seconds
            if not more:
                return progress

    def _sleep(self) -> None:
        with self._condition:
            while not self._notified and not self._stopping:
                self._condition.wait()
            self._notified = False
