"""What a worker tells routers of its prefix index: numbered changes, and snapshots on request."""

from __future__ import annotations

from pshare_jax.core.messages import IndexChanged, IndexSnapshot
from pshare_jax.core.pages.page_cache import PageCache


class IndexFeed:
    """Numbers the changes of one page cache, from 1 on.

    Args:
        cache: whose index it is.

    Attributes:
        incarnation: of the worker; a random one tells a router that the worker is not the one that
            had its name before. Where that cannot happen it is 0.
    """

    def __init__(self, cache: PageCache):
        self.incarnation = 0
        self._cache = cache
        self._number = 0

    def change(self) -> IndexChanged | None:
        """What has changed since the last call; None if nothing has."""
        added, removed = self._cache.changes()
        if not added and not removed:
            return None
        self._number += 1
        return IndexChanged(added, removed, self._number, self.incarnation)

    def snapshot(self) -> IndexSnapshot:
        """All keys of now. What `change` has yet to tell is in it, and may be told again."""
        return IndexSnapshot(self._cache.keys(), self._number, self.incarnation)
