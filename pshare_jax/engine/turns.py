"""Engines that compute on one processor take turns, instead of slowing each other down.

On accelerators prefill and decode have devices of their own. On a CPU both use all cores, and two
computations at once take each other's caches and threads: nothing is won, and decode steps with few
rows take half of the time that prompts wait for. Turns are shared out by weighted fair queueing,
see `fair_queue`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from pshare_jax.engine.fair_queue import FairQueue, Share


@dataclass(eq=False)
class Member(Share):
    """Who takes turns: a share, and the event with which its thread is called."""

    called: threading.Event = field(default_factory=threading.Event)


class Turns:
    """One member at a time; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: FairQueue[Member] = FairQueue()

    def take(self, member: Member) -> None:
        """Waits for the member's turn."""
        with self._lock:
            member.called.clear()
            if self._queue.take(member):
                return
        member.called.wait()

    def end(self, member: Member, seconds: float, *, more: bool) -> bool:
        """Ends a piece of work; the arguments are those of `FairQueue.end`.

        Returns:
            Whether the member may go on; if not, the turn is over.
        """
        with self._lock:
            following = self._queue.end(member, seconds, more=more)
            if following is not None and following is not member:
                following.called.set()
            return following is member
