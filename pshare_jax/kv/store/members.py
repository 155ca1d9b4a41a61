"""Who uses a pool: each process holds a lock on a byte of its own, which it loses when it dies.

The locks belong to open file descriptions (OFD), so that two users in one process are two members,
and nothing is to be cleaned up after a kill. They lie far behind the end of the file.
"""

from __future__ import annotations

import fcntl
import os
import struct

MAX_MEMBERS = 64
"""Processes that may use a pool at once."""

_FIRST_BYTE = 1 << 40
_FLOCK = "hhqqi4x"


class Members:
    """The members of a pool.

    Args:
        descriptor: of the pool's file; looks at the locks of others through it.
    """

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._own: int | None = None
        self.me = -1
        """Number of the member that has joined through this object."""

    def join(self, file: str | int) -> bool:
        """Takes the first number that nobody has; False when all are taken.

        Args:
            file: its path, or a descriptor of its own, which is closed with the membership.
        """
        self._own = file if isinstance(file, int) else os.open(file, os.O_RDWR | os.O_CLOEXEC)
        for number in range(MAX_MEMBERS):
            try:
                fcntl.fcntl(self._own, fcntl.F_OFD_SETLK, _range(number, 1))
            except (BlockingIOError, PermissionError):
                continue
            self.me = number
            return True
        self.leave()
        return False

    def leave(self) -> None:
        """Gives the number up."""
        if self._own is not None:
            os.close(self._own)
            self._own, self.me = None, -1

    def alive(self, number: int) -> bool:
        """Whether a member lives."""
        return number == self.me or self._locked(number, 1)

    def anybody(self) -> bool:
        """Whether any member lives."""
        return self.me >= 0 or self._locked(0, MAX_MEMBERS)

    def _locked(self, first: int, count: int) -> bool:
        found = fcntl.fcntl(self._descriptor, fcntl.F_OFD_GETLK, _range(first, count))
        return struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK


def _range(first: int, count: int) -> bytes:
    return struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _FIRST_BYTE + first, count, 0)
