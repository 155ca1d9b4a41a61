"""Turns at a processor that several processes share: one computes at a time, by fair shares.

Engines of one CPU take each other's caches and threads when they compute at once. In one process
they share a thread, see `cluster.thread`; between processes a lock stands for it. Shares are those
of weighted fair queueing: of those who have work, who has had least of its weight is next. It is a
matter of speed alone, and nobody waits for long for who does not run: a process that is stopped
must not stop the others.

The table of a processor is a file with a slot for each process: the share that it has had, and
whether it has work; and when one has last handed work over. Who holds the lock of the file has the
turn.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from pshare_jax.kv.store.members import MAX_MEMBERS, Members
from pshare_jax.kv.store.private import open_private

WAIT_SECONDS = 1.0
"""How long a turn is waited for; after that it is taken without."""

YIELD_SECONDS = 0.02
"""How long a turn that is free is left to who comes first by his share and does not take it."""

HANDOVER_SECONDS = 0.005
"""How long a turn is left alone after another process has handed work over in the one before: the
news come by then, and what is to be done with them need not wait for another piece of work."""

PAUSE_SECONDS = 100e-6
"""Between two looks."""

_HEAD = 64
_SLOT = np.dtype([("virtual", "<f8"), ("works", "<u8")])
_SIZE = _HEAD + MAX_MEMBERS * _SLOT.itemsize


class Turns(Protocol):
    """What a thread that hosts workers asks before it computes."""

    def begin(self, interrupted: Callable[[], bool]) -> bool:
        """Waits for a turn, for as long as `interrupted` does not say that there is something else
        to do. Whether it is to be worked now; `end` follows only then."""
        ...

    @property
    def is_wanted(self) -> bool:
        """Whether another process has work."""
        ...

    def end(self, *, hands_over: bool) -> None:
        """Gives the turn up; there may be more work. Says whether others have been sent some."""
        ...

    def rests(self) -> None:
        """There is no work."""
        ...


class HostTurns:
    """One process's place in the turns at a processor. Belongs to one thread.

    Args:
        path: file of the table, which all processes of the processor name.
        weight: its share, relative to other processes that have work.
        clock: seconds.

    Raises:
        OSError: the file cannot be made or used, or too many use it.
    """

    def __init__(
        self, path: str | Path, weight: float, clock: Callable[[], float] = time.monotonic
    ):
        self._weight = weight
        self._clock = clock
        self._file = open_private(path, os.O_CREAT)
        os.posix_fallocate(self._file, 0, _SIZE)
        self._members = Members(self._file)
        if not self._members.join(str(path)):
            os.close(self._file)
            raise OSError(f"{path}: {MAX_MEMBERS} processes take turns already")
        memory = mmap.mmap(self._file, _SIZE)
        self._now = np.frombuffer(memory, "<f8", 1)
        self._handed = np.frombuffer(memory, "<f8", 1, self._now.nbytes)
        slots = np.frombuffer(memory, _SLOT, MAX_MEMBERS, _HEAD)
        self._virtual, self._works = slots["virtual"], slots["works"]
        self._me = self._members.me
        self._works[self._me] = 0
        self._virtual[self._me] = self._now[0]
        self._has_turn = False
        self._heard = float(self._handed[0])
        self._begun = 0.0
        self._waits_until: float | None = None
        self._impatient = False

    @property
    def virtual_seconds(self) -> float:
        """What this process has had, divided by its weight."""
        return float(self._virtual[self._me])

    def begin(self, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Waits for a turn; not for ever, also if it is begun anew after each interruption.

        Args:
            interrupted: asked again and again whether there is something else to do.

        Returns:
            False after an interruption; what is waited for stays the same.
        """
        if not self._works[self._me]:
            # Time that a member had no use for is not made up for.
            self._virtual[self._me] = max(self._virtual[self._me], self._now[0])
            self._waits_until = None
        if self._waits_until is None:
            self._waits_until = self._clock() + (0.0 if self._impatient else WAIT_SECONDS)
        has_turn = self._wait(self._waits_until, interrupted)
        if has_turn is None:
            return False
        self._waits_until = None
        self._has_turn = has_turn
        # After one that was waited for in vain, none is waited for until there is one to be had.
        self._impatient = not has_turn
        self._now[0] = max(self._now[0], self._virtual[self._me])
        self._begun = self._clock()
        return True

    @property
    def is_wanted(self) -> bool:
        """Whether another process has work."""
        mine = int(self._works[self._me] != 0)
        return int(np.count_nonzero(self._works)) > mine

    def end(self, *, hands_over: bool = False) -> None:
        """Gives the turn up; others who have had less leave it to this process meanwhile.

        Args:
            hands_over: whether others have just been sent what they will compute with.
        """
        now = self._clock()
        self._virtual[self._me] += (now - self._begun) / self._weight
        if hands_over:
            self._handed[0] = self._heard = now
        self._unlock()

    def rests(self) -> None:
        """There is no work; nobody leaves a turn to this process until it begins again."""
        self._works[self._me] = 0

    def close(self) -> None:
        """Leaves."""
        self.rests()
        self._members.leave()
        os.close(self._file)

    def _wait(self, end: float, interrupted: Callable[[], bool]) -> bool | None:
        """Whether a turn came before the clock says `end`; None if it was interrupted before."""
        free_since: float | None = None
        while True:
            self._works[self._me] = 1
            if self._lock():
                now = self._clock()
                free_since = now if free_since is None else free_since
                first = self._before_me()
                if not len(first) and not self._awaits(now):
                    return True
                if now - free_since > YIELD_SECONDS:
                    # Whoever lives and has work says so again.
                    self._works[first] = 0
                    return True
                self._unlock()
            else:
                free_since = None
            if self._clock() >= end:
                return False
            if interrupted():
                self._heard = float(self._handed[0])
                return None
            time.sleep(PAUSE_SECONDS)

    def _awaits(self, now: float) -> bool:
        """Whether another process has just handed work over, and nothing has come since."""
        handed = float(self._handed[0])
        return handed != self._heard and 0 <= now - handed < HANDOVER_SECONDS

    def _before_me(self) -> np.ndarray:
        """Slots of those who have work and have had less."""
        return np.flatnonzero((self._works != 0) & (self._virtual < self._virtual[self._me]))

    def _lock(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self._has_turn = True
        return True

    def _unlock(self) -> None:
        if self._has_turn:
            self._has_turn = False
            fcntl.flock(self._file, fcntl.LOCK_UN)
