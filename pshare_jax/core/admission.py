"""Who may enter a decode worker: slots and pages are reserved before anything is moved."""

from __future__ import annotations

from dataclasses import dataclass

from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.prefix_index import Node, PageState
from pshare_jax.core.sequences import Sequence


@dataclass(frozen=True)
class Reservation:
    """Room for one sequence in a decode worker.

    `pages` are the sequence's pages in order of position. Those numbered in `fill` (page numbers
    within the sequence) hold nothing yet and have to be fetched; `arriving` are the index nodes of
    the fresh shared ones by their number, `awaited` nodes that another sequence is filling.
    """

    slot: int
    pages: list[int]
    fill: list[int]
    arriving: dict[int, Node]
    awaited: dict[int, Node]


class Admission:
    """Gives slots and pages of one decode worker to sequences, and takes them back.

    Full prompt pages that the pool holds, or that are on their way to it, are shared. A page for
    each sequence that is inside is left over, so that arrivals do not at once cause preemptions.

    Args:
        cache: the pages.
        num_slots: sequences that may be inside at once.
    """

    def __init__(self, cache: PageCache, num_slots: int):
        self._cache = cache
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots))

    @property
    def num_inside(self) -> int:
        """Sequences with a slot: those that run and those on their way."""
        return self._num_slots - len(self._free_slots)

    @property
    def num_slots(self) -> int:
        """Sequences that may be inside at once."""
        return self._num_slots

    @property
    def has_slot(self) -> bool:
        """Whether one more sequence may be inside."""
        return bool(self._free_slots)

    def reserve(
        self, sequence: Sequence, *, favoured: bool = False, most: int | None = None
    ) -> Reservation | None:
        """A slot and pages for all known tokens, or None when there is no room now.

        Args:
            sequence: who wants to enter.
            favoured: whether it may take the pages that are left over for others.
            most: fresh pages that it may take.
        """
        if not self._free_slots:
            return None
        cache = self._cache
        shared = cache.match(sequence.keys, sequence.prompt)
        needed = -(-sequence.num_tokens // cache.page_size) - len(shared)
        spare = 0 if favoured else self.num_inside
        enough = cache.num_available >= needed + spare and (most is None or needed <= most)
        fresh = cache.allocate(needed) if enough else None
        if fresh is None:
            cache.release(node.page for node in shared)
            return None
        pages = [node.page for node in shared] + fresh
        return Reservation(
            slot=self._free_slots.pop(),
            pages=pages,
            fill=list(range(len(shared), -(-sequence.num_held // cache.page_size))),
            arriving=self._index_arriving(sequence, shared, pages),
            awaited={
                number: node
                for number, node in enumerate(shared)
                if node.state is not PageState.READY
            },
        )

    def leave(self, slot: int, pages: list[int]) -> None:
        """Takes back what a sequence held."""
        self._cache.release(pages)
        self._free_slots.append(slot)

    def _index_arriving(
        self, sequence: Sequence, shared: list[Node], pages: list[int]
    ) -> dict[int, Node]:
        """Indexes the full prompt pages that will be filled, so that others share them."""
        arriving: dict[int, Node] = {}
        parent = shared[-1] if shared else None
        page_size = self._cache.page_size
        for number in range(len(shared), len(sequence.keys)):
            parent = Node(
                parent=parent,
                parent_key=sequence.parent_key(number),
                page=pages[number],
                tokens=sequence.prompt[number * page_size : (number + 1) * page_size],
                origins=[],
                key=sequence.keys[number],
                state=PageState.ARRIVING,
                filler=sequence.id,
            )
            self._cache.insert(parent)
            arriving[number] = parent
        return arriving
