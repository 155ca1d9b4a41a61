"""Reference counts and the free list of a pool's pages."""

from __future__ import annotations

PADDING_PAGE = 0
"""The page that takes the writes of padding; it is never handed out."""


class PageAllocator:
    """Hands out page indices 1..num_pages-1 and counts references to them.

    A page with no references is free unless it is `kept` (held by a prefix index).
    """

    def __init__(self, num_pages: int):
        if num_pages < 2:
            raise ValueError(f"a pool needs at least 2 pages (one is padding), got {num_pages}")
        self.num_pages = num_pages
        self._refs = [0] * num_pages
        self._kept = [False] * num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self.num_used = 0
        """Pages that are referenced."""
        self.num_shared = 0
        """Pages that are referenced more than once."""

    @property
    def num_free(self) -> int:
        """Pages that can be handed out at once."""
        return len(self._free)

    def refs(self, page: int) -> int:
        """References to `page`."""
        return self._refs[page]

    def allocate(self) -> int:
        """A free page with one reference.

        Raises:
            IndexError: no page is free.
        """
        page = self._free.pop()
        self._refs[page] = 1
        self.num_used += 1
        return page

    def retain(self, page: int) -> None:
        """Adds a reference to a page that is referenced or kept."""
        if page == PADDING_PAGE or (self._refs[page] == 0 and not self._kept[page]):
            raise AssertionError(f"page {page} is not in use and cannot be retained")
        self._refs[page] += 1
        self.num_used += self._refs[page] == 1
        self.num_shared += self._refs[page] == 2

    def release(self, page: int) -> bool:
        """Drops a reference; True when it was the last one. Frees the page unless it is kept."""
        if self._refs[page] <= 0:
            raise AssertionError(f"page {page} was released more often than it was retained")
        self._refs[page] -= 1
        self.num_shared -= self._refs[page] == 1
        if self._refs[page]:
            return False
        self.num_used -= 1
        if not self._kept[page]:
            self._free.append(page)
        return True

    def keep(self, page: int) -> None:
        """Marks a referenced page as held by the index."""
        if self._refs[page] == 0:
            raise AssertionError(f"page {page} is free and cannot be kept")
        self._kept[page] = True

    def unkeep(self, page: int) -> None:
        """The index lets go of the page; frees it when nothing references it."""
        if not self._kept[page]:
            raise AssertionError(f"page {page} is not held by the index")
        self._kept[page] = False
        if self._refs[page] == 0:
            self._free.append(page)

    def check(self) -> None:
        """Asserts that every page is exactly one of free, referenced or kept."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is in the free list twice"
        assert PADDING_PAGE not in free, "the padding page is in the free list"
        for page in range(1, self.num_pages):
            in_use = self._refs[page] > 0 or self._kept[page]
            assert in_use != (page in free), f"page {page} is lost or free while in use"
        assert self.num_used == sum(refs > 0 for refs in self._refs)
        assert self.num_shared == sum(refs > 1 for refs in self._refs)
