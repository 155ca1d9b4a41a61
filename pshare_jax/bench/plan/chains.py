"""A pool's page book in a session's terms: how much of each growing context it holds.

Sessions share no prefix, and a session's context only grows. So what one kind of weights wrote of
one session is one chain of pages, and the engine's page cache (`pshare_jax.cache`) comes down to a
length for each chain, evicted from its end, the least recently used chain first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

Key = Hashable
"""Session and, where models do not share, model."""


@dataclass(eq=False)
class Lease:
    """Pages that one sequence holds: the first `pages` of a chain, and `private` ones."""

    key: Key
    pages: int
    private: int


@dataclass(eq=False)
class _Chain:
    """`tokens` in `pages` pages; `origins` are the ends of runs, and by whom they were computed."""

    tokens: int = 0
    pages: int = 0
    origins: list[tuple[int, int]] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    held: int = 0

    @property
    def unused(self) -> int:
        return self.pages - self.held


class ChainPool:
    """The pages of one pool.

    Args:
        num_pages: as configured; one of them is padding.
        page_size: tokens of a page.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.page_size = page_size
        self.num_usable = num_pages - 1
        self._chains: dict[Key, _Chain] = {}
        self._unused: OrderedDict[Key, None] = OrderedDict()
        self._private = 0
        self._indexed = 0
        self._held = 0
        self.peak_pages = 0

    @property
    def num_available(self) -> int:
        """Pages that could be handed out now, evictions included."""
        return self.num_usable - self._private - self._held

    @property
    def num_used(self) -> int:
        """Pages that sequences hold."""
        return self._private + self._held

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def tokens(self, key: Key) -> int:
        """Length of a chain."""
        chain = self._chains.get(key)
        return 0 if chain is None else chain.tokens

    def origins(self, key: Key, tokens: int) -> Counter[int]:
        """The first tokens of a chain, counted by who had them computed."""
        counts: Counter[int] = Counter()
        start = 0
        for end, model in self._chains[key].origins if tokens else ():
            counts[model] += max(min(end, tokens) - start, 0)
            start = end
        return counts

    def hold(self, key: Key, pages: int) -> Lease:
        """Keeps the first `pages` pages of a chain, which it must have, from eviction."""
        chain = self._chains.setdefault(key, _Chain())
        lease = Lease(key, pages, 0)
        chain.leases.append(lease)
        self._reheld(key, chain)
        return lease

    def allocate(self, lease: Lease, count: int) -> bool:
        """Adds private pages to a lease; False, and no change, when there are too few."""
        if self.num_available < count:
            return False
        self._evict(self._private + self._indexed + count - self.num_usable)
        lease.private += count
        self._private += count
        self.peak_pages = max(self.peak_pages, self._private + self._indexed)
        return True

    def extend(self, lease: Lease, tokens: int, model: int) -> None:
        """The lease's chain now has `tokens` tokens, the new ones in pages that were private."""
        chain = self._chains[lease.key]
        if tokens <= chain.tokens:
            return
        chain.tokens = tokens
        chain.origins.append((tokens, model))
        grown = self.pages_for(tokens) - chain.pages
        chain.pages += grown
        self._indexed += grown
        self._private -= grown
        lease.private -= grown
        lease.pages = chain.pages
        self._reheld(lease.key, chain)

    def release(self, lease: Lease) -> None:
        """The sequence has ended or moved on; its part of the chain stays while there is room."""
        self._private -= lease.private
        chain = self._chains[lease.key]
        chain.leases.remove(lease)
        whole = lease.pages == chain.pages
        self._reheld(lease.key, chain)
        if whole and lease.key in self._unused:
            self._unused.move_to_end(lease.key)

    def _reheld(self, key: Key, chain: _Chain) -> None:
        held = max((lease.pages for lease in chain.leases), default=0)
        self._held += held - chain.held
        chain.held = held
        if chain.unused:
            self._unused.setdefault(key)
        else:
            self._unused.pop(key, None)
            if not chain.pages and not chain.leases:
                del self._chains[key]

    def _evict(self, count: int) -> None:
        while count > 0:
            key = next(iter(self._unused))
            chain = self._chains[key]
            taken = min(count, chain.unused)
            count -= taken
            chain.pages -= taken
            self._indexed -= taken
            chain.tokens = min(chain.tokens, chain.pages * self.page_size)
            chain.origins = [(min(e, chain.tokens), m) for e, m in self._reaching(chain)]
            self._reheld(key, chain)

    @staticmethod
    def _reaching(chain: _Chain) -> list[tuple[int, int]]:
        """Runs of origins that begin before the chain's end."""
        starts = [0, *[end for end, _ in chain.origins]]
        runs = zip(starts, chain.origins, strict=False)
        return [run for start, run in runs if start < chain.tokens]
