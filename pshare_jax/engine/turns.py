"""Engines that compute on one processor take turns, instead of slowing each other down.

On accelerators prefill and decode have devices of their own. On a CPU both use all cores, and two
computations at once take each other's caches and threads: nothing is won, and decode steps with few
rows take half of the time that prompts wait for. Turns are shared out by weighted fair queueing
(Demers et al., 1989): each member's time, divided by its weight, grows alike.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field


@dataclass(eq=False)
class Member:
    """Who takes turns.

    Args:
        weight: its share of the time, relative to other members that have work.
    """

    weight: float
    virtual_seconds: float = 0.0
    called: threading.Event = field(default_factory=threading.Event)


class Turns:
    """One member at a time; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: list[Member] = []
        self._now = 0.0

    def take(self, member: Member) -> None:
        """Waits for the member's turn."""
        with self._lock:
            # Time that it had no use for is not made up for.
            member.virtual_seconds = max(member.virtual_seconds, self._now)
            if not self._taken:
                self._taken = True
                return
            member.called.clear()
            self._waiting.append(member)
        member.called.wait()

    def end(self, member: Member, seconds: float, *, more: bool) -> bool:
        """Ends a piece of work.

        Args:
            member: whose turn it is.
            seconds: how long the piece took.
            more: whether it would go on.

        Returns:
            Whether it may, since nobody who waits has had less; if not, the turn is over.
        """
        with self._lock:
            self._now = max(self._now, member.virtual_seconds)
            member.virtual_seconds += seconds / member.weight
            first = min(self._waiting, key=lambda m: m.virtual_seconds, default=None)
            if more and (first is None or member.virtual_seconds < first.virtual_seconds):
                return True
            if first is None:
                self._taken = False
            else:
                self._waiting.remove(first)
                first.called.set()
            return False
