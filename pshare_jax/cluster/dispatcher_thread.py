"""The thread that hosts a dispatcher."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class DispatcherThread:
    """Runs actions one after the other in a thread of its own, each followed by `after`.

    Args:
        after: carries what an action has brought about.
        on_failure: called with the reason when an action or `after` raises; the thread goes on.
    """

    def __init__(self, after: Callable[[], None], on_failure: Callable[[str], None]):
        self._after = after
        self._on_failure = on_failure
        self._actions: list[Callable[[], None]] = []
        self._condition = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def post(self, action: Callable[[], None]) -> None:
        """Has an action run; from any thread."""
        with self._condition:
            self._actions.append(action)
            self._condition.notify()

    def stop(self) -> None:
        """Ends the thread once all actions so far have run, and waits for it."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._actions and not self._stopping:
                    self._condition.wait()
                actions, self._actions = self._actions, []
                if not actions and self._stopping:
                    return
            for action in actions:
                self._do(action)
            self._do(self._after)

    def _do(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            logger.exception("the dispatcher has failed")
            self._on_failure(f"dispatcher: {type(error).__name__}: {error}")
