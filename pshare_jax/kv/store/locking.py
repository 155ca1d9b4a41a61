"""The one lock of a pool's books, which the kernel takes from whoever dies."""

from __future__ import annotations

import fcntl
import time

LOCK_SECONDS = 2.0
"""How long the lock is waited for: a holder that is stopped must not stop all others for ever."""

_FIRST_PAUSE, _LONGEST_PAUSE = 20e-6, 2e-3


class PoolBusyError(Exception):
    """Somebody has held the lock of the books for too long."""


def lock(descriptor: int, seconds: float = LOCK_SECONDS) -> None:
    """Takes the lock.

    Raises:
        PoolBusyError: it was not to be had in time.
    """
    end, pause = None, _FIRST_PAUSE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            now = time.monotonic()
            end = now + seconds if end is None else end
            if now >= end:
                raise PoolBusyError(f"its lock was held by others for {seconds:g} s") from None
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def unlock(descriptor: int) -> None:
    """Gives the lock up."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
