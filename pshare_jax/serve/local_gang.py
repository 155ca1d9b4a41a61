"""A gang on this machine, as one process of the launcher: it is ready, ends and is killed whole."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pshare_jax.serve.local_host import LocalProcess

NOTICE_SECONDS = 10.0
"""That the others may take to end by themselves when one has."""


class LocalGang:
    """Children of this process that have one mesh together.

    Args:
        members: by rank.
    """

    def __init__(self, members: Sequence[LocalProcess]):
        self._leader, *self._followers = members
        self._members = list(members)
        self._codes: list[int] = []
        self._all_ended = threading.Event()
        self._watching = [
            threading.Thread(target=self._watch, args=(follower,), daemon=True)
            for follower in self._followers
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
        self._codes.append(self._leader.wait())
        for thread in self._watching:
            thread.join(NOTICE_SECONDS)
        self.kill()
        for thread in self._watching:
            thread.join()
        self._all_ended.set()
        # A configuration that cannot be served is found by whoever reads it first.
        return max(self._codes)

    def terminate(self) -> None:
        """See `Process.terminate`: the first one tells the others."""
        self._leader.terminate()

    def kill(self) -> None:
        """See `Process.kill`."""
        for member in self._members:
            member.kill()

    def _watch(self, follower: LocalProcess) -> None:
        """Waits for the end of one; the first one must not wait for it any more, and ends."""
        self._codes.append(follower.wait())
        threading.Thread(target=self._end_first, daemon=True).start()

    def _end_first(self) -> None:
        if not self._all_ended.wait(NOTICE_SECONDS):
            self._leader.kill()
