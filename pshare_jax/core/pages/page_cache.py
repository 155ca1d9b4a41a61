"""The pages of one pool and the index of their contents.

Each pool has one; one thread uses it. Every page is at all times free, referenced by
a sequence, or held by the index; the last kind is evicted, least recently used leaf first, when
pages run out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pshare_jax.core.pages.allocator import PageAllocator
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
    """Allocation, reference counts, prefix look-up and eviction for one pool."""

    def __init__(self, num_pages: int, page_size: int):
        self.page_size = page_size
        self._allocator = PageAllocator(num_pages)
        self._index = PrefixIndex()

    @property
    def num_usable(self) -> int:
        """Pages that sequences may hold at the most."""
        return self._allocator.num_pages - 1

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could hand out now, evictions included."""
        return self._allocator.num_free + self._index.num_unused

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, or None (and no change) when there are too few."""
        if self.num_available < count:
            return None
        while self._allocator.num_free < count:
            self._evict()
        return [self._allocator.allocate() for _ in range(count)]

    def release(self, pages: Iterable[int]) -> None:
        """Drops one reference of each page; pass a sequence's pages in order of position."""
        for page in reversed(list(pages)):
            node = self._index.node_of(page)
            if self._allocator.release(page) and node is not None:
                self._index.offer(node)

    def match(self, keys: Sequence[bytes], tokens: Sequence[int]) -> list[Node]:
        """References and returns the longest indexed run of full pages of `tokens`.

        `keys` are the chained keys of the blocks of `tokens`.
        """
        found = self._find(keys, tokens)
        for node in found:
            self.retain(node)
        return found

    def matched_tokens(self, keys: Sequence[bytes], tokens: Sequence[int]) -> int:
        """Number of leading tokens whose full pages are indexed; references nothing."""
        return len(self._find(keys, tokens)) * self.page_size

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
        node.state = PageState.FAILED
        self._allocator.unkeep(node.page)

    def changes(self) -> tuple[list[bytes], list[bytes]]:
        """Keys of full pages that have entered and left the index since the last call."""
        added, removed = self._index.added, self._index.removed
        self._index.added, self._index.removed = [], []
        return added, removed

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

    def _evict(self) -> None:
        node = self._index.least_recent()
        assert node is not None, "unused pages are indexed, so one of them is a leaf"
        self._index.remove(node)
        self._allocator.unkeep(node.page)
