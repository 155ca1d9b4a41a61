"""Requests that wait for a worker to come, since none could answer them."""

from __future__ import annotations


class Parked:
    """Ids of requests, and until when they wait.

    Args:
        patience: seconds that a request waits from the first look at the clock on; what parks again
            after a worker has come has waited since then.
    """

    def __init__(self, patience: float):
        self._patience = patience
        self._deadlines: dict[str, float | None] = {}

    def add(self, id: str) -> None:
        """A request found no worker."""
        self._deadlines.setdefault(id, None)

    def drop(self, id: str) -> None:
        """A request waits no more."""
        self._deadlines.pop(id, None)

    def ids(self) -> list[str]:
        """Who waits, longest first."""
        return list(self._deadlines)

    def expired(self, now: float) -> list[str]:
        """Who has waited too long; `now` is in seconds of the host's clock."""
        over = [id for id, end in self._deadlines.items() if end is not None and now >= end]
        for id, end in self._deadlines.items():
            if end is None:
                self._deadlines[id] = now + self._patience
        return over
