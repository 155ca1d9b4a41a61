"""Weighted fair queueing as a policy: whose turn is next. No threads, no clock.

Each member's time, divided by its weight, grows alike (Demers et al., 1989).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar


@dataclass(eq=False)
class Share:
    """What a member has had of what turns are taken on.

    Args:
        weight: its share of the time, relative to other members that have work.
    """

    weight: float
    virtual_seconds: float = 0.0


S = TypeVar("S", bound=Share)


class FairQueue(Generic[S]):
    """Whose turn it is, and who waits for one."""

    def __init__(self) -> None:
        self.waiting: list[S] = []
        self._taken = False
        self._now = 0.0

    def take(self, member: S) -> bool:
        """Whether it is the member's turn at once; if not, it waits from now on."""
        # Time that it had no use for is not made up for.
        member.virtual_seconds = max(member.virtual_seconds, self._now)
        if self._taken:
            self.waiting.append(member)
            return False
        self._taken = True
        return True

    def end(self, member: S, seconds: float, *, more: bool) -> S | None:
        """Ends a piece of work.

        Args:
            member: whose turn it is.
            seconds: how long the piece took.
            more: whether it would go on.

        Returns:
            Whose turn it is now: the member's if nobody who waits has had less, that of one who
            waited, or None.
        """
        self._now = max(self._now, member.virtual_seconds)
        member.virtual_seconds += seconds / member.weight
        first = min(self.waiting, key=lambda m: m.virtual_seconds, default=None)
        if more and (first is None or member.virtual_seconds < first.virtual_seconds):
            return member
        if first is None:
            self._taken = False
        else:
            self.waiting.remove(first)
        return first
