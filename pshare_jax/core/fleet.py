"""The workers of one kind as a router sees them, and which of them a sequence costs least.

Every worker has a number, its slot. What each has to do is a list of integers, and who holds which
key a set of bits, so that a choice among a thousand workers takes a fraction of a millisecond.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from pshare_jax.core.key_map import KeyMap, Mask, members
from pshare_jax.core.worker_view import WorkerInfo, WorkerView

_KNOWN_BITS = 32
_KNOWN = (1 << _KNOWN_BITS) - 1
_ROUND = (1 << 64) - 1
_FEW = 32
"""Workers that are put in order one by one, rather than looked for along the ring."""

_POINTS = 16
"""Places of a worker on the ring: the more there are, the more equal their parts."""


@dataclass(frozen=True)
class Among:
    """Workers to choose from, by slot: as a list and as a set of bits."""

    slots: Sequence[int]
    mask: Mask


class Cost(msgspec.Struct, frozen=True, order=True):
    """What a sequence would cost at a worker; the least is the best.

    Args:
        total: what it waits for and what it adds, in the unit of the router.
        added: what of that it adds: among equals where least is done that was done elsewhere. A
            last page that is not full is known by its tokens only to the worker that has it, so
            that such a worker may cost less than is seen here.
        num_known: keys that the worker has: then the emptiest, so that new sessions spread.
        slot: of the worker; the first among those that are equal in all.
        run: leading keys of the sequence that it has.
    """

    total: int
    added: int
    num_known: int
    slot: int
    run: int


class Fleet:
    """Workers of one kind.

    Args:
        busy: what a worker has to do, in the unit of the router.
        spreads: whether the emptiest is chosen among equals.

    Attributes:
        views: the workers that are alive, by name, in the order in which they came.
    """

    def __init__(self, busy: Callable[[WorkerView], int], *, spreads: bool):
        self.views: dict[str, WorkerView] = {}
        self._busy = busy
        self._spreads = spreads
        self._known = KeyMap()
        self._slots: list[WorkerView | None] = []
        self._ranks: list[int] = []
        self._points: list[list[int]] = []
        self._ring: list[tuple[int, int]] = []

    def add(self, info: WorkerInfo) -> WorkerView:
        """A worker has come, or come again with nothing that is known of it."""
        self.lose(info.name)
        if None in self._slots:
            slot = self._slots.index(None)
        else:
            slot = len(self._slots)
            self._slots.append(None)
            self._ranks.append(0)
            self._points.append([])
        view = WorkerView(info, slot, self._known)
        self._points[slot] = _points(info.name)
        for point in self._points[slot]:
            bisect.insort(self._ring, (point, slot))
        self.views[info.name], self._slots[slot] = view, view
        self.touch(view)
        return view

    def lose(self, name: str) -> WorkerView | None:
        """A worker is not there any more; what was known of it, if it was there."""
        view = self.views.pop(name, None)
        if view is not None:
            view.clear()
            self._slots[view.slot] = None
            for point in self._points[view.slot]:
                del self._ring[bisect.bisect_left(self._ring, (point, view.slot))]
        return view

    def touch(self, view: WorkerView) -> None:
        """What a worker has to do, or what it holds, has changed."""
        known = min(view.num_known, _KNOWN) if self._spreads else 0
        self._ranks[view.slot] = (self._busy(view) << _KNOWN_BITS) | known

    def among(self, names: Iterable[str]) -> Among:
        """Those of the names that are alive."""
        slots = sorted({self.views[name].slot for name in names if name in self.views})
        mask = 0
        for slot in slots:
            mask |= 1 << slot
        return Among(slots, mask)

    def at(self, slot: int) -> WorkerView:
        """The worker of a slot that is in use."""
        view = self._slots[slot]
        assert view is not None
        return view

    def run(self, view: WorkerView, chain: Sequence[bytes]) -> int:
        """How many of the first keys a worker has."""
        found = self._known.runs(chain, 1 << view.slot)
        return found[0][0] if found else 0

    def holder(self, chain: Sequence[bytes], first: WorkerView) -> tuple[int, WorkerView | None]:
        """Who holds most of the first keys, and how many; `first` if it is among several.

        Keys of prompts that were sent to a worker and are not there yet do not count, but may hide
        who holds fewer.
        """
        found = self._known.runs(chain, (1 << len(self._slots)) - 1)
        if not found:
            return 0, None
        _, mask = found[0]
        view = self.at(first.slot if mask >> first.slot & 1 else next(members(mask)))
        return sum(1 for _ in itertools.takewhile(view.held.__contains__, chain)), view

    def cost(self, view: WorkerView, run: int, price: Callable[[int], int]) -> Cost:
        """What a sequence costs at a worker that has its first `run` keys; see `cheapest`."""
        rank = self._ranks[view.slot]
        added = price(run)
        return Cost((rank >> _KNOWN_BITS) + added, added, rank & _KNOWN, view.slot, run)

    def cheapest(
        self,
        chain: Sequence[bytes],
        among: Among,
        price: Callable[[int], int],
        meeting: int = 0,
    ) -> Cost:
        """The worker that a sequence costs least.

        Args:
            chain: keys of the sequence.
            among: who may be chosen; not nobody.
            price: what the sequence adds where its first so many keys are; more keys, less.
            meeting: how much more than the least a worker may have to do, to be chosen because
                other routers choose it as well: the first from a place that the keys give, among
                those that have as many of them as the cheapest.
        """
        idlest = min(among.slots, key=self._ranks.__getitem__)
        best, peers = self.cost(self.at(idlest), 0, price), 0
        least = self._ranks[idlest] >> _KNOWN_BITS
        for run, mask in self._known.runs(chain, among.mask):
            if price(run) + least > best.total:
                # Who has fewer keys cannot be cheaper either.
                break
            slot = idlest
            if not mask >> idlest & 1:
                slot = min(members(mask), key=self._ranks.__getitem__)
            cost = self.cost(self.at(slot), run, price)
            if cost < best or slot == best.slot:
                best, peers = cost, mask
        if meeting and len(among.slots) > 1:
            return self._met(chain, among, best, peers, meeting)
        return best

    def _met(
        self, chain: Sequence[bytes], among: Among, best: Cost, peers: Mask, meeting: int
    ) -> Cost:
        """The first worker that is as good as the best, give or take what it has to do."""
        if not peers:
            peers = among.mask
            for _, mask in self._known.runs(chain, among.mask):
                peers &= ~mask
        busiest = (self._ranks[best.slot] >> _KNOWN_BITS) + meeting
        new = chain[min(best.run, len(chain) - 1)] if chain else b""
        for slot in self._from(_point(new), peers):
            if self._ranks[slot] >> _KNOWN_BITS <= busiest:
                more = (self._ranks[slot] >> _KNOWN_BITS) - (busiest - meeting)
                known = self._ranks[slot] & _KNOWN
                return Cost(best.total + more, best.added, known, slot, best.run)
        return best

    def _from(self, start: int, mask: Mask) -> Iterator[int]:
        """Workers in an order that a place and their names give, the same for every router."""
        if mask.bit_count() <= _FEW:
            yield from sorted(members(mask), key=lambda slot: _mixed(self._points[slot][0], start))
            return
        first = bisect.bisect_left(self._ring, (start, 0))
        for part in (self._ring[first:], self._ring[:first]):
            yield from (slot for _, slot in part if mask >> slot & 1)


def _point(digest: bytes) -> int:
    """A place on the ring."""
    return int.from_bytes(digest[:8])


def _points(name: str) -> list[int]:
    """The places of a worker."""
    names = (f"{name}/{number}".encode() for number in range(_POINTS))
    return [_point(hashlib.blake2b(name, digest_size=8).digest()) for name in names]


def _mixed(one: int, other: int) -> int:
    """A number that looks random, the same for the same two."""
    mixed = (one ^ other) * 0x9E3779B97F4A7C15 & _ROUND
    mixed ^= mixed >> 29
    return mixed * 0xBF58476D1CE4E5B9 & _ROUND
