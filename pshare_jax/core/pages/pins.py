"""Pages that sessions asked to be kept for some time though nobody holds them.

A pin is a place in the order of eviction, not a hold: pinned pages go last, but they go before
anybody waits for a page. Times are in seconds, from any start; there is no clock here.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from pshare_jax.core.pages.prefix_index import Node, PrefixIndex

_LOOK_SECONDS = 1.0
"""Between two looks for pins that have expired."""


class Pins:
    """The pinned pages of one pool, and until when each is pinned.

    Args:
        limit: most pages that are pinned. Beyond, those whose pins were renewed longest ago lose
            them, so that no session keeps others from being pinned.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._until: OrderedDict[Node, float] = OrderedDict()
        self._next_look = -math.inf

    def __len__(self) -> int:
        return len(self._until)

    def __contains__(self, node: Node) -> bool:
        return node in self._until

    def renew(self, node: Node, until: float) -> None:
        """Pins a page until then, or for as long as it is pinned already if that is longer."""
        self._until[node] = max(until, self._until.get(node, until))
        self._until.move_to_end(node)

    def drop(self, node: Node) -> None:
        """Ends a page's pin, if it has one."""
        self._until.pop(node, None)

    def too_many(self) -> list[Node]:
        """Takes out the pages that are beyond the limit."""
        return [self._until.popitem(last=False)[0] for _ in range(len(self) - self._limit)]

    def expired(self, now: float) -> list[Node]:
        """Takes out the pages whose time is over, looked for once a second."""
        if now < self._next_look:
            return []
        self._next_look = now + _LOOK_SECONDS
        over = [node for node, until in self._until.items() if until <= now]
        for node in over:
            del self._until[node]
        return over

    def check(self, index: PrefixIndex) -> None:
        """Asserts that no more pages are pinned than may be, and that all of them are indexed."""
        assert len(self) <= self._limit, f"{len(self)} pages are pinned, at most {self._limit} may"
        assert all(index.node_of(node.page) is node for node in self._until)
