"""What covering a prompt's tokens costs: computing them, or fetching their pages from the store.

Computing positions a .. b-1 takes `token (b - a) + pair (b^2 - a^2)` seconds, the second part being
attention, after what is queued at the prefill worker. Fetching pages takes `call + page n` seconds
of their tier, after what is queued there. The two queues run beside each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

NOWHERE, SHARED, DISK = 0, 1, 2
"""Where a page's record is: in no tier, in the pool of shared memory, on disk."""


class Prices(msgspec.Struct, frozen=True):
    """Seconds, measured when the engine starts.

    Args:
        token: to compute a token.
        pair: to attend, for half of a square of positions.
        call: to begin a fetch, by tier (`SHARED`, `DISK`).
        page: to fetch a page, by tier.
    """

    token: float
    pair: float
    call: dict[int, float]
    page: dict[int, float]

    def compute(self, first: int, end: int) -> float:
        """Seconds to compute positions `first` .. `end` - 1."""
        return self.token * (end - first) + self.pair * (end * end - first * first)

    def fetch(self, places: Sequence[int]) -> float:
        """Seconds to fetch pages that are at those places."""
        calls = sum(self.call[place] for place in set(places))
        return calls + sum(self.page[place] for place in places)

    def pages_to_fetch(
        self, places: Sequence[int], ends: Sequence[int], first: int, covered: int, *queues: float
    ) -> int:
        """How many of the first pages had better be fetched rather than computed.

        Args:
            places: of the pages that could be fetched, one after the other.
            ends: the position after each of them.
            first: the first position that is not there.
            covered: positions that have to be there in the end.
            queues: seconds of work that wait at the prefill worker, and at the store.
        """
        computing, fetching = queues
        best, least = 0, computing + self.compute(first, covered)
        for count, end in enumerate(ends, start=1):
            fetched = fetching + self.fetch(places[:count])
            whole = max(fetched, computing if end < covered else 0.0) + self.compute(end, covered)
            if whole < least:
                best, least = count, whole
        return best
