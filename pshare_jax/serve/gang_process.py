"""A gang as one process of the launcher: it is ready, ends and is killed whole."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from pshare_jax.serve.supervision import Process

log = logging.getLogger(__name__)

NOTICE_SECONDS = 10.0
"""That the others may take to end by themselves when one has."""


class GangProcess:
    """Processes that have one mesh together, wherever they run.

    Args:
        name: of the worker that they are.
        members: by rank.
        on_end: called once all have ended.
    """

    def __init__(
        self, name: str, members: Sequence[Process], on_end: Callable[[], None] = lambda: None
    ):
        self._name = name
        self._leader, *self._followers = members
        self._members = list(members)
        self._on_end = on_end
        self._codes: list[int] = []
        self._all_ended = threading.Event()
        self._watching = [
            threading.Thread(target=self._watch, args=(rank, follower), daemon=True)
            for rank, follower in enumerate(self._followers, 1)
        ]
        for thread in self._watching:
            thread.start()

    @property
    def address(self) -> str:
        """See `Process.address`: that of the first one."""
        return self._leader.address

    @property
    def pid(self) -> int:
        """See `Process.pid`: that of the first one."""
        return self._leader.pid

    @property
    def pids(self) -> list[int]:
        """Of all, by rank."""
        return [member.pid for member in self._members]

    def wait_until_ready(self) -> bool:
        """See `Process.wait_until_ready`."""
        return self._leader.wait_until_ready()

    def wait(self) -> int:
        """See `Process.wait`: all have ended; the code of one that says what was wrong."""
        self._ended(0, self._leader.wait())
        for thread in self._watching:
            thread.join(NOTICE_SECONDS)
        self.kill()
        for thread in self._watching:
            thread.join()
        self._all_ended.set()
        self._on_end()
        # A configuration that cannot be served is found by whoever reads it first.
        return max(self._codes)

    def terminate(self) -> None:
        """See `Process.terminate`: the first one tells the others."""
        self._leader.terminate()

    def kill(self) -> None:
        """See `Process.kill`."""
        for member in self._members:
            member.kill()

    def _watch(self, rank: int, follower: Process) -> None:
        """Waits for the end of one; the first one must not wait for it any more, and ends."""
        self._ended(rank, follower.wait())
        threading.Thread(target=self._end_first, daemon=True).start()

    def _ended(self, rank: int, code: int) -> None:
        log.info("process %d of %s has ended with code %d", rank, self._name, code)
        self._codes.append(code)

    def _end_first(self) -> None:
        if not self._all_ended.wait(NOTICE_SECONDS):
            self._leader.kill()
