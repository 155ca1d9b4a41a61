"""Weighted fair queueing as a policy: whose turn is next. No threads, no clock.

Each member's time, divided by its weight, grows alike (Demers et al., 1989).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(eq=False)
class Share:
    """What a member has had of what turns are taken on.

    Args:
        weight: its share of the time, relative to other members that have work.
    """

    weight: float
    virtual_seconds: float = 0.0
    idle: bool = True


class FairTurns:
    """In which order members should be asked for work."""

    def __init__(self) -> None:
        self._now = 0.0

    def order(self, members: Iterable[Share]) -> list[Share]:
        """All members: first who has had least, among those that had no work as if just come."""
        members = list(members)
        # Time that a member had no use for is not made up for.
        for member in members:
            if member.idle:
                member.virtual_seconds = max(member.virtual_seconds, self._now)
        return sorted(members, key=lambda member: member.virtual_seconds)

    def worked(self, member: Share, seconds: float) -> None:
        """A piece of work of a member took so long."""
        # It may have worked out of turn, without having been asked in order.
        if member.idle:
            member.virtual_seconds = max(member.virtual_seconds, self._now)
        self._now = max(self._now, member.virtual_seconds)
        member.idle = False
        member.virtual_seconds += seconds / member.weight

    def rests(self, member: Share) -> None:
        """A member was asked and had nothing to do."""
        member.idle = True
