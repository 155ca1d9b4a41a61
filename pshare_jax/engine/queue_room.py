"""Which sequences may wait, and how long those that may not should stay away."""

from __future__ import annotations

from collections import Counter, deque

from pshare_jax.core.requests import Owner

_SPARE = 4
"""A part of the queue, one in so many places, is for requests of which nothing waits yet."""

_REMEMBERED = 64
_MIN_SECONDS, _MAX_SECONDS = 1.0, 120.0


class QueueRoom:
    """Counts sequences from their submission to their first token.

    A full queue refuses those who fill it. A client of which less waits than its share of the
    queue, and a request of which nothing waits, still find some room behind it.

    Args:
        max_queue: sequences that may wait.
    """

    def __init__(self, max_queue: int):
        self._max_queue = max_queue
        self._waiting: dict[str, Owner] = {}
        self._by_key: Counter[str] = Counter()
        self._by_request: Counter[tuple[str, str]] = Counter()
        self._weights: dict[str, float] = {}
        self._starts: deque[float] = deque(maxlen=_REMEMBERED)

    def is_full(self, owner: Owner, num_waiting: int) -> bool:
        """Whether a sequence has to be refused, while `num_waiting` sequences have no slot."""
        if num_waiting < self._max_queue:
            return False
        weights = {**self._weights, owner.key: owner.weight}
        share = self._max_queue * owner.weight / sum(weights.values())
        if len(weights) > 1 and self._by_key[owner.key] < share:
            return False
        is_first = not self._by_request[owner.key, owner.request] or not owner.request
        return not is_first or num_waiting >= self._max_queue + self._max_queue // _SPARE

    def add(self, id: str, owner: Owner) -> None:
        """A sequence begins to wait."""
        self._waiting[id] = owner
        self._by_key[owner.key] += 1
        self._by_request[owner.key, owner.request] += 1
        self._weights[owner.key] = owner.weight

    def started(self, id: str, now: float) -> None:
        """It has got its first token; `now` is in seconds."""
        if self._remove(id):
            self._starts.append(now)

    def ended(self, id: str) -> None:
        """It is over, whether it has started or not."""
        self._remove(id)

    def retry_after(self, now: float) -> float:
        """Seconds after which what waits now will have started, as fast as it has gone lately."""
        if not self._starts or now <= self._starts[0]:
            return _MIN_SECONDS
        rate = len(self._starts) / (now - self._starts[0])
        return min(max(len(self._waiting) / rate, _MIN_SECONDS), _MAX_SECONDS)

    def _remove(self, id: str) -> bool:
        owner = self._waiting.pop(id, None)
        if owner is None:
            return False
        # Counters keep what has come to 0, unless it is taken out.
        self._by_key -= Counter([owner.key])
        self._by_request -= Counter([(owner.key, owner.request)])
        if owner.key not in self._by_key:
            del self._weights[owner.key]
        return True
