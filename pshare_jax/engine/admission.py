"""Who may enter a decode engine: slots and pages are reserved before a handoff. No jax here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pshare_jax.cache.layout import PageLayout
from pshare_jax.cache.page_cache import PageCache
from pshare_jax.cache.prefix_index import Node
from pshare_jax.engine.sequence import Sequence


@dataclass(frozen=True)
class Reservation:
    """Room for one sequence on a decode engine.

    `pages` are the sequence's decode pages in order of position. Those numbered in `fill` (page
    numbers within the sequence) hold nothing yet and have to be moved; `arriving` are the index
    nodes of the fresh shared ones, `awaited` nodes that another handoff is filling.
    """

    slot: int
    pages: list[int]
    fill: list[int]
    arriving: list[Node]
    awaited: list[Node]


class Admission:
    """Gives slots and pages of one decode engine to sequences, and takes them back. Thread-safe.

    Full prompt pages that the pool holds, or that are on their way to it, are shared. A page for
    each sequence that is inside is left over, so that arrivals do not at once cause preemptions. A
    sequence that was refused is served before all younger ones, whichever prefill engine they
    come from.

    Args:
        cache: the pages.
        layout: their shape.
        num_slots: sequences that may be inside at once.
        on_room: called when a refused sequence should be tried again.
    """

    def __init__(
        self, cache: PageCache, layout: PageLayout, num_slots: int, on_room: Callable[[], None]
    ):
        self._cache = cache
        self._layout = layout
        self._on_room = on_room
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots))
        self._first_refused: Sequence | None = None

    @property
    def num_inside(self) -> int:
        """Sequences with a slot: those that run and those on their way."""
        return self._num_slots - len(self._free_slots)

    def reserve(self, sequence: Sequence) -> Reservation | None:
        """A slot and pages for all known tokens, or None when there is no room now."""
        with self._cache.lock:
            first = self._first_refused
            if first is not None and not first.abandoned and first.order < sequence.order:
                return None
            reservation = self._reserve(sequence) if self._free_slots else None
            if reservation is None:
                self._first_refused = sequence
                return None
            if first is not sequence:
                return reservation
            self._first_refused = None
        # Others may have been refused for its sake.
        self._on_room()
        return reservation

    def leave(self, slot: int, pages: list[int]) -> None:
        """Takes back what a sequence held."""
        with self._cache.lock:
            self._cache.release(pages)
            self._free_slots.append(slot)
        self._on_room()

    def _reserve(self, sequence: Sequence) -> Reservation | None:
        cache, layout = self._cache, self._layout
        shared = cache.match(sequence.keys, sequence.prompt)
        needed = layout.pages_for(sequence.num_tokens) - len(shared)
        enough = cache.num_available >= needed + self.num_inside
        fresh = cache.allocate(needed) if enough else None
        if fresh is None:
            cache.release(node.page for node in shared)
            return None
        pages = [node.page for node in shared] + fresh
        return Reservation(
            slot=self._free_slots.pop(),
            pages=pages,
            fill=list(range(len(shared), layout.pages_for(sequence.cover))),
            arriving=self._index_arriving(sequence, shared, pages),
            awaited=[node for node in shared if not node.ready],
        )

    def _index_arriving(
        self, sequence: Sequence, shared: list[Node], pages: list[int]
    ) -> list[Node]:
        """Indexes the full prompt pages that will be filled, so that others share them."""
        arriving: list[Node] = []
        parent = shared[-1] if shared else None
        for number in range(len(shared), len(sequence.keys)):
            parent = Node(
                parent=parent,
                parent_key=sequence.parent_key(number),
                page=pages[number],
                tokens=sequence.cover_block(number),
                origins=[],
                key=sequence.keys[number],
                ready=False,
            )
            self._cache.insert(parent)
            arriving.append(parent)
        return arriving
