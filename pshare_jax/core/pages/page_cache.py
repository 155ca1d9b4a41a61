"""The pages of one pool and the index of their contents.

Each pool has one; one thread uses it. Every page is at all times free, referenced by
a sequence, or held by the index; the last kind is evicted, least recently used leaf first, when
pages run out. Pages that sessions have pinned come last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pshare_jax.core.pages.allocator import PageAllocator
from pshare_jax.core.pages.pins import Pins
from pshare_jax.core.pages.prefix_index import Node, PageState, PrefixIndex


@dataclass(frozen=True)
class PageCounts:
    """Pages of a pool by state. `shared` are referenced more than once; `cached` only indexed."""

    total: int
    free: int
    used: int
    shared: int
    cached: int


class PageCache:
    """Allocation, reference counts, prefix look-up and eviction for one pool.

    Args:
        num_pages: of the pool, the padding page included.
        page_size: tokens of a page.
        pinned_share: most of the pages that sessions may have pinned.

    Attributes:
        now: seconds, from any start, as `tick` was last told.
    """

    def __init__(self, num_pages: int, page_size: int, pinned_share: float = 0.5):
        self.page_size = page_size
        self.now = 0.0
        self._allocator = PageAllocator(num_pages)
        self._index = PrefixIndex()
        self._pins = Pins(int(pinned_share * self.num_usable))

    @property
    def num_usable(self) -> int:
        """Pages that sequences may hold at the most."""
        return self._allocator.num_pages - 1

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could hand out now, evictions included."""
        return self._allocator.num_free + self._index.num_unused

    def allocate(self, count: int, *, spare_pinned: bool = False) -> list[int] | None:
        """`count` pages with one reference each, or None when there are too few.

        None means that nothing was evicted, unless pinned pages were to be spared.
        """
        if self.num_available < count:
            return None
        while self._allocator.num_free < count:
            if not self._evict(pinned=not spare_pinned):
                return None
        return [self._allocator.allocate() for _ in range(count)]

    def tick(self, now: float) -> None:
        """Says what time it is; pins whose time is over end."""
        self.now = max(self.now, now)
        # A chain was pinned from its end; its end is to be evicted first, too.
        for node in reversed(self._pins.expired(self.now)):
            self._index.unpin(node)

    def pin(self, pages: Sequence[int], until: float) -> None:
        """Keeps the indexed ones of a sequence's pages, in order of position, from being evicted.

        Until then (see `tick`) they go after all that are not pinned, at most `pinned_share` of the
        pool. A page and what comes before it are pinned together, the last page least recently.
        """
        if until <= self.now:
            return
        for page in reversed(pages):
            node = self._index.node_of(page)
            if node is not None:
                self._pins.renew(node, until)
                self._index.pin(node)
        for node in reversed(self._pins.too_many()):
            self._index.unpin(node)

    @property
    def num_pinned(self) -> int:
        """Pages that are pinned, referenced or not."""
        return len(self._pins)

    def release(self, pages: Iterable[int]) -> None:
        """Drops one reference of each page; pass a sequence's pages in order of position."""
        for page in reversed(list(pages)):
            node = self._index.node_of(page)
            if self._allocator.release(page) and node is not None:
                self._index.offer(node, pinned=node in self._pins)

    def hold(self, pages: Iterable[int]) -> None:
        """Adds a reference to each of these pages, which somebody holds."""
        for page in pages:
            self._allocator.retain(page)

    def match(
        self, keys: Sequence[bytes], tokens: Sequence[int], *, ready: bool = False
    ) -> list[Node]:
        """References and returns the longest indexed run of full pages of `tokens`.

        `keys` are the chained keys of the blocks of `tokens`. With `ready` it ends before a page
        that is still on its way: who reads pages at once must not be given one.
        """
        found = self._find(keys, tokens)
        if ready:
            found = list(itertools.takewhile(lambda node: node.state is PageState.READY, found))
        for node in found:
            self.retain(node)
        return found

    def matched_tokens(self, keys: Sequence[bytes], tokens: Sequence[int]) -> int:
        """Number of leading tokens whose full pages are indexed; references nothing."""
        return len(self._find(keys, tokens)) * self.page_size

    def find(self, key: bytes, tokens: Sequence[int]) -> Node | None:
        """The full page of a chain key, if its tokens are these; references nothing."""
        return self._index.get(key, tokens)

    def is_arriving(self, key: bytes) -> bool:
        """Whether the full page of a chain key is on its way."""
        return self._index.is_arriving(key)

    def retain(self, node: Node) -> None:
        """Adds a reference to an indexed page."""
        self._allocator.retain(node.page)
        self._index.withdraw(node)

    def best_child(self, parent_key: bytes, tokens: Sequence[int]) -> tuple[Node, int] | None:
        """The page below `parent_key` that starts with most of `tokens`, and how many of them."""
        return self._index.best_child(parent_key, tokens)

    def insert(self, node: Node) -> None:
        """Indexes a referenced page. No page of that key may be indexed: match first."""
        self._allocator.keep(node.page)
        self._index.insert(node)

    def forget(self, node: Node) -> None:
        """Takes a page out of the index, whose contents never came, and all that follow it.

        Those cannot be reached without it. Sequences may still hold the pages.
        """
        for follower in self._index.followers(node):
            self.forget(follower)
        self._index.remove(node)
        self._pins.drop(node)
        node.state = PageState.FAILED
        self._allocator.unkeep(node.page)

    def changes(self) -> tuple[list[bytes], list[bytes]]:
        """Keys of full pages that have entered and left the index since the last call.

        A key that has done both is told of as it is now.
        """
        added, removed = self._index.added, self._index.removed
        self._index.added, self._index.removed = [], []
        removed = [key for key in removed if not self._index.has(key)]
        gone = set(removed)
        return [key for key in added if key not in gone], removed

    def keys(self) -> list[bytes]:
        """Keys of all full pages that are indexed now."""
        return self._index.keys()

    def extend(
        self, node: Node, tokens: tuple[int, ...], origins: list[str], key: bytes | None
    ) -> None:
        """Notes that a partly filled page now holds `tokens`, the new ones from `origins`.

        `key` is the chain key of a page that has become full.
        """
        node.tokens = tokens
        node.origins = node.origins + origins
        if key is not None:
            self._index.complete(node, key)

    def node_of(self, page: int) -> Node | None:
        """The index node that holds `page`, if it is indexed."""
        return self._index.node_of(page)

    @property
    def num_indexed(self) -> int:
        """Pages that the index holds, referenced or not."""
        return len(self._index)

    def newest_nodes(self, count: int) -> list[Node]:
        """The pages that were indexed last, newest first. Other threads may call it."""
        return self._index.newest(count)

    def counts(self) -> PageCounts:
        """Pages by state."""
        return PageCounts(
            total=self.num_usable,
            free=self._allocator.num_free,
            used=self._allocator.num_used,
            shared=self._allocator.num_shared,
            cached=self._index.num_unused,
        )

    def check(self, *, idle: bool = False) -> None:
        """Asserts the invariants; with `idle`, also that no sequence holds a page."""
        self._allocator.check()
        self._pins.check(self._index)
        counts = self.counts()
        assert counts.free + counts.used + counts.cached == counts.total, counts
        if idle:
            assert counts.used == 0, f"{counts.used} pages are held though nothing runs"

    def _find(self, keys: Sequence[bytes], tokens: Sequence[int]) -> list[Node]:
        found: list[Node] = []
        for i, key in enumerate(keys):
            block = tokens[i * self.page_size : (i + 1) * self.page_size]
            node = self._index.get(key, block)
            if node is None:
                break
            found.append(node)
        return found

    def _evict(self, *, pinned: bool = True) -> bool:
        """Evicts a page; False if only pinned ones are left, and may not go."""
        node = self._index.least_recent(pinned=pinned)
        assert node is not None or not pinned, "unused pages are indexed: one of them is a leaf"
        if node is None:
            return False
        self._index.remove(node)
        self._pins.drop(node)
        self._allocator.unkeep(node.page)
        return True
