"""Covered sequences that wait for room in a decode worker, and who of them enters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from pshare_jax.core.admission import Admission, Reservation
from pshare_jax.core.messages import Covered
from pshare_jax.core.sequences import Sequence
from pshare_jax.core.shares import Holdings

_MAX_PASSING = 4
"""Sequences that are looked at, at a time, to go past one that waits for room."""


class DecodeQueue:
    """Gives room by fair shares, and lets small sequences past those that wait.

    Args:
        admission: slots and pages.
        page_size: tokens of a page.
    """

    def __init__(self, admission: Admission, page_size: int):
        self._admission = admission
        self._page_size = page_size
        self._waiting: dict[int, Covered] = {}
        self._passed: dict[int, int] = {}
        self._favoured: set[int] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def ids(self) -> set[int]:
        """Sequences that wait."""
        return set(self._waiting)

    def sequences(self) -> list[Sequence]:
        """Sequences that wait."""
        return [covered.sequence for covered in self._waiting.values()]

    def add(self, covered: Covered) -> None:
        """A sequence has been covered."""
        self._waiting[covered.sequence.id] = covered

    def remove(self, id: int) -> Covered | None:
        """Takes a sequence out, if it is here."""
        self._passed.pop(id, None)
        self._favoured.discard(id)
        return self._waiting.pop(id, None)

    def forget_offer(self, id: int) -> None:
        """If a sequence waits, what was on offer for it is so no more."""
        if (covered := self._waiting.get(id)) is not None:
            self._waiting[id] = msgspec.structs.replace(covered, offer=None)

    def clear(self) -> None:
        """Forgets all."""
        for id in tuple(self._waiting):
            self.remove(id)

    @property
    def oldest(self) -> Covered:
        """Who has waited longest; somebody must wait."""
        return min(self._waiting.values(), key=lambda covered: covered.sequence.order)

    def enter(
        self, holdings: Callable[[], Holdings], make_room: Callable[[Sequence], bool]
    ) -> Iterator[tuple[Covered, Reservation]]:
        """Takes sequences out, each with its room, until there is none for the next.

        Args:
            holdings: what is held now; each sequence that is taken out holds its part at once.
            make_room: has somebody give way to a sequence, if that is fair, and says whether.
        """
        while self._waiting:
            if self._admission.num_inside == 0:
                # Who runs alone and lacks pages gives way, and would be next again by what it
                # holds. The oldest gets on, since all others make room for it.
                covered = self.oldest
                if (room := self._reserve(covered)) is None:
                    return
                yield covered, room
                continue
            covered = holdings().next(self._waiting.values())
            id = covered.sequence.id
            if (room := self._reserve(covered)) is not None:
                yield covered, room
            # Once for a sequence, so that it does not take from others again and again.
            elif id not in self._favoured and make_room(covered.sequence):
                self._favoured.add(id)
            else:
                yield from self._pass(covered, holdings())
                return

    def _pass(self, first: Covered, holdings: Holdings) -> Iterator[tuple[Covered, Reservation]]:
        """Small sequences do not wait until there is room for `first`, which is large.

        Together they take no more pages than it needs, so that it does not wait for ever.
        """
        id = first.sequence.id
        needed = -(-first.sequence.num_tokens // self._page_size)
        others = [covered for covered in self._waiting.values() if covered is not first]
        for _ in range(min(len(others), _MAX_PASSING)):
            if not self._admission.has_slot:
                return
            covered = holdings.next(others)
            others.remove(covered)
            room = self._reserve(covered, most=needed - self._passed.get(id, 0))
            if room is not None:
                self._passed[id] = self._passed.get(id, 0) + len(room.pages)
                yield covered, room

    def _reserve(self, covered: Covered, most: int | None = None) -> Reservation | None:
        sequence = covered.sequence
        favoured = sequence.id in self._favoured
        room = self._admission.reserve(sequence, favoured=favoured, most=most)
        if room is not None:
            self.remove(sequence.id)
        return room
