"""What a prefill core writes to the KV store: pages of prompts that have let them go.

They are written as far as the store keeps up. Nothing waits for that: a page may be evicted from
the pool meanwhile, and is left out then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from collections.abc import Sequence as Sequence_

from pshare_jax.core import messages as m
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.prefix_index import Node, PageState
from pshare_jax.core.plans import Save
from pshare_jax.core.prefill_task import PrefillTask
from pshare_jax.core.sequences import Sequence

MAX_SAVES = 64
"""Pages that are being written; others are not begun meanwhile."""

MAX_REMEMBERED = 2**16
"""Keys that are known to be in the store, and pages that could be written."""


def page_keys(sequence: Sequence, page_size: int) -> list[bytes]:
    """Keys of all pages that are covered, the last one included if it is partly filled."""
    whole = len(sequence.keys) * page_size == sequence.covered
    return sequence.keys if whole else sequence.chain


class WriteBehind:
    """Pages that could be written, are being written, and are in the store.

    Args:
        cache: the core's pages.
    """

    def __init__(self, cache: PageCache):
        self._cache = cache
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._candidates: OrderedDict[bytes, tuple[Node, tuple[int, ...]]] = OrderedDict()
        self._touched: list[bytes] = []
        self._saving: set[bytes] = set()
        self.added: list[bytes] = []
        """Keys that have become known since somebody last looked, see `changes`."""
        self.removed: list[bytes] = []

    @property
    def idle(self) -> bool:
        """Whether nothing is left to be written or being written."""
        return not (self._candidates or self._touched or self._saving)

    @property
    def has_more(self) -> bool:
        """Whether pages are left to be copied out of the pool."""
        return bool(self._candidates)

    def released(self, task: PrefillTask) -> None:
        """A prompt lets its pages go: they are written, or touched if the store has them."""
        sequence, page_size = task.sequence, self._cache.page_size
        for number, key in enumerate(page_keys(sequence, page_size)):
            if key in self._known:
                self._touched.append(key)
                continue
            node = self._cache.node_of(task.pages[number])
            if node is not None and node.borrowed:
                break  # the store's keys name who computed: not this, nor what it was made from
            start = number * page_size
            tokens = sequence.prompt[start : min(start + page_size, sequence.covered)]
            if node is not None and key not in self._saving:
                self._candidates[key] = node, tokens
        while len(self._candidates) > MAX_REMEMBERED:
            self._candidates.popitem(last=False)

    def next_saves(self, limit: int) -> list[Save]:
        """At most `limit` pages that are to be copied out of the pool now."""
        saves: list[Save] = []
        while self._candidates and len(saves) < limit and len(self._saving) < MAX_SAVES:
            key, (node, tokens) = self._candidates.popitem(last=False)
            held = self._cache.node_of(node.page) is node and node.state is PageState.READY
            if held and node.tokens[: len(tokens)] == tokens:
                saves.append(Save(key, node.page, tokens))
                self._saving.add(key)
        return saves

    def take_touched(self) -> list[bytes]:
        """Keys of pages that were used once more since the last call."""
        touched, self._touched = self._touched, []
        return touched

    def stored(self, answer: m.Stored) -> None:
        """Pages have been written, or were not; others turned out to be gone."""
        self._saving.difference_update(answer.done)
        self.know(answer.kept)
        self.know_not(answer.gone)

    def changes(self) -> tuple[list[bytes], list[bytes]]:
        """Keys of pages that the store has, or has no longer, as was heard since the last call."""
        added, self.added = self.added, []
        removed, self.removed = self.removed, []
        return added, removed

    def known(self) -> list[bytes]:
        """Keys of all pages that the store is known to have."""
        return list(self._known)

    def knows(self, key: bytes) -> bool:
        """Whether the store is known to have a page."""
        return key in self._known

    def know(self, keys: Sequence_[bytes]) -> None:
        """The store has these pages."""
        for key in keys:
            if key not in self._known:
                self.added.append(key)
            self._known[key] = None
            self._known.move_to_end(key)
        while len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)

    def know_not(self, keys: Collection[bytes]) -> None:
        """The store does not have these pages any more."""
        for key in keys:
            if self._known.pop(key, key) is None:
                self.removed.append(key)
