"""Sequences that have room in a decode pool, while their pages are on the way to it.

A page of the pool is absent (not indexed), arriving, ready or failed. Each arriving page has one
filler, the sequence whose transfer brings it; others wait for it. A page whose filler has failed
goes to the first sequence that waits for it, which fetches it from where its own prompt was
covered; if nobody waits, the page leaves the index.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pshare_jax.core import messages as m
from pshare_jax.core.admission import Reservation
from pshare_jax.core.messages import Outbox, PageDescriptor
from pshare_jax.core.pages.allocator import PADDING_PAGE
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.prefix_index import Node, PageState
from pshare_jax.core.plans import Pull
from pshare_jax.core.requests import PromptUsage
from pshare_jax.core.sequences import Sequence

MAX_FETCHES = 2
"""Transfers that may fail before a sequence is given back to be covered elsewhere."""

TRANSFER_SECONDS = 10.0
"""After this a transfer counts as failed."""


@dataclass(eq=False)
class Transfer:
    """Pages, numbered within the sequence, that are on their way; `deadline` in seconds."""

    arrival: Arrival
    numbers: list[int]
    deadline: float | None = None
    pulled: bool = False


@dataclass(eq=False)
class Arrival:
    """A sequence with a slot and pages, of which some are not there yet.

    `filling` are the indexed pages that its own transfers bring, `awaited` those that others do.
    """

    sequence: Sequence
    usage: PromptUsage
    reservation: Reservation
    filling: dict[int, Node] = field(default_factory=dict[int, Node])
    awaited: dict[int, Node] = field(default_factory=dict[int, Node])
    transfers: set[int] = field(default_factory=set[int])
    failures: int = 0

    @property
    def complete(self) -> bool:
        """Whether all its pages are there."""
        ready = all(node.state is PageState.READY for node in self.awaited.values())
        return ready and not self.transfers


class Arrivals:
    """Transfers of one decode worker.

    Args:
        worker: its name.
        cache: its pages.
        outbox: where messages to prefill workers go.
        transfer_ids: never used twice; hard to guess where transfers cross processes.
    """

    def __init__(self, worker: str, cache: PageCache, outbox: Outbox, transfer_ids: Iterator[int]):
        self._worker = worker
        self._cache = cache
        self._outbox = outbox
        self._ids = transfer_ids
        self._arrivals: dict[int, Arrival] = {}
        self._transfers: dict[int, Transfer] = {}
        self.pulls: list[Pull] = []
        """Transfers to begin, for the next plan."""
        self.cancelled: list[int] = []
        """Transfers to give up, for the next plan."""

    def __len__(self) -> int:
        return len(self._arrivals)

    @property
    def is_pulling(self) -> bool:
        """Whether the executor has been told of transfers that have not ended."""
        return any(transfer.pulled for transfer in self._transfers.values())

    def ids(self) -> set[int]:
        """Ids of the sequences that are here."""
        return set(self._arrivals)

    def sequences(self) -> list[Sequence]:
        """The sequences that are here."""
        return [arrival.sequence for arrival in self._arrivals.values()]

    @property
    def waits(self) -> bool:
        """Whether any transfer is under way, so that deadlines count."""
        return bool(self._transfers)

    def add(
        self,
        sequence: Sequence,
        usage: PromptUsage,
        reservation: Reservation,
        offer: m.Offered | None = None,
        first: int = 0,
    ) -> bool:
        """A sequence has got room; what it lacks is fetched.

        Args:
            sequence: who.
            usage: where its prompt's KV came from.
            reservation: its room.
            offer: pages numbered from `first` on that are on offer already.
            first: see `offer`.

        Returns:
            Whether what is on offer was enough, so that nobody is asked.
        """
        arrival = Arrival(sequence, usage, reservation)
        arrival.filling = dict(reservation.arriving)
        arrival.awaited = dict(reservation.awaited)
        self._arrivals[sequence.id] = arrival
        fill = reservation.fill
        if offer is not None and fill and self._is_enough(offer, first, fill):
            self._begin(arrival, fill, offer.transfer)
            self.offered(offer.transfer, offer.descriptors, offer.address, first)
            return True
        self._fetch(arrival, fill)
        return False

    def offered(
        self,
        transfer_id: int,
        descriptors: list[PageDescriptor],
        address: str = "",
        first: int | None = None,
    ) -> None:
        """The pages of a transfer can be pulled.

        Args:
            transfer_id: of the transfer.
            descriptors: of its pages.
            address: where from.
            first: number of the first of them, if they are not those that were asked for; there may
                be more than is wanted.
        """
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            self.let_go(transfer_id)
            return
        if transfer.pulled:
            return
        transfer.pulled = True
        sequence, pages = transfer.arrival.sequence, transfer.arrival.reservation.pages
        chain, wanted = sequence.held_keys, set(transfer.numbers)
        numbers = transfer.numbers
        if first is not None:
            numbers = range(first, first + len(descriptors))
        self.pulls.append(
            Pull(
                transfer_id,
                sequence.prefill_worker,
                descriptors,
                [chain[number] for number in numbers],
                [pages[number] if number in wanted else PADDING_PAGE for number in numbers],
                address,
            )
        )

    def knows(self, transfer_id: int) -> bool:
        """Whether a transfer is under way."""
        return transfer_id in self._transfers

    def let_go(self, transfer_id: int) -> None:
        """What is on offer as a transfer, and may be read already, is not wanted unless that is
        under way."""
        if transfer_id not in self._transfers:
            self.cancelled.append(transfer_id)

    def landed(self, transfer_id: int) -> None:
        """All pages of a transfer are in the pool and what was asked for. Late ones are ignored."""
        transfer = self._transfers.pop(transfer_id, None)
        if transfer is None:
            return
        arrival = transfer.arrival
        arrival.transfers.discard(transfer_id)
        for number in transfer.numbers:
            node = arrival.filling.pop(number, None)
            if node is not None:
                node.state, node.filler = PageState.READY, None

    def failed(self, transfer_id: int) -> Arrival | None:
        """A transfer has failed; it is tried once more.

        Returns:
            The sequence, if it has been tried often enough: then it has been removed.
        """
        transfer = self._transfers[transfer_id]
        arrival = transfer.arrival
        self._cancel(transfer_id)
        arrival.failures += 1
        if arrival.failures < MAX_FETCHES:
            self._fetch(arrival, transfer.numbers)
            return None
        return self.remove(arrival.sequence.id)

    def expired(self, now: float) -> list[int]:
        """Transfers that have taken too long; `now` is in seconds, from any start."""
        late: list[int] = []
        for transfer_id, transfer in self._transfers.items():
            if transfer.deadline is None:
                transfer.deadline = now + TRANSFER_SECONDS
            elif now >= transfer.deadline:
                late.append(transfer_id)
        return late

    def refetch(self) -> list[Arrival]:
        """Has sequences fetch what they have waited for in vain.

        That are pages that a prompt of the same pool was to bring from the KV store, or that left
        the index with one before them. They go into pages of the sequence's own: in those that it
        shared somebody else computes or fetches the same now.

        Returns:
            The sequences for which there are no such pages. They have been removed.
        """
        crowded = [a for a in self._arrivals.values() if not self._replace_failed(a)]
        for arrival in crowded:
            self.remove(arrival.sequence.id)
        return crowded

    def _replace_failed(self, arrival: Arrival) -> bool:
        failed = [n for n, node in arrival.awaited.items() if node.state is PageState.FAILED]
        fresh = self._cache.allocate(len(failed))
        if fresh is None:
            return False
        pages = arrival.reservation.pages
        self._cache.release(pages[number] for number in failed)
        for number, page in zip(failed, fresh, strict=True):
            pages[number] = page
            del arrival.awaited[number]
        self._fetch(arrival, failed)
        return True

    @property
    def any_complete(self) -> bool:
        """Whether any sequence has all its pages."""
        return any(arrival.complete for arrival in self._arrivals.values())

    def complete(self) -> list[Arrival]:
        """Takes out the sequences whose pages are all there."""
        done = [arrival for arrival in self._arrivals.values() if arrival.complete]
        for arrival in done:
            del self._arrivals[arrival.sequence.id]
        return done

    def remove(self, id: int) -> Arrival | None:
        """Takes a sequence out; its transfers end, and others fetch what they waited for.

        The caller gives its slot and pages back.
        """
        arrival = self._arrivals.pop(id, None)
        if arrival is None:
            return None
        for transfer_id in tuple(arrival.transfers):
            self._cancel(transfer_id)
        # From the end, so that a page that nobody waits for is a leaf.
        needed: dict[int, list[int]] = {}
        for number in sorted(arrival.filling, reverse=True):
            heir = self._pass_on(number, arrival.filling[number])
            if heir is not None:
                needed.setdefault(heir, []).insert(0, number)
        for heir, numbers in needed.items():
            self._fetch(self._arrivals[heir], numbers)
        return arrival

    def _pass_on(self, number: int, node: Node) -> int | None:
        """Finds who fills a page that has failed; without anybody it leaves the index.

        If it has left it already, with a page before it, whoever waits for it fetches it himself.
        """
        if node.state is PageState.FAILED:
            return None
        waiting = [a for a in self._arrivals.values() if a.awaited.get(number) is node]
        if not waiting:
            self._cache.forget(node)
            return None
        heir = min(waiting, key=lambda arrival: arrival.sequence.order)
        del heir.awaited[number]
        heir.filling[number] = node
        node.filler = heir.sequence.id
        return heir.sequence.id

    def _fetch(self, arrival: Arrival, numbers: list[int]) -> None:
        if not numbers:
            return
        transfer_id = next(self._ids)
        self._begin(arrival, numbers, transfer_id)
        sequence = arrival.sequence
        fetch = m.Fetch(self._worker, transfer_id, sequence.held_id, numbers)
        self._outbox.append((sequence.prefill_worker, fetch))

    def _is_enough(self, offer: m.Offered, first: int, fill: list[int]) -> bool:
        """Whether all that is lacking is on offer, up to the last page of the prompt."""
        ends = first + len(offer.descriptors) == fill[-1] + 1
        return ends and 0 <= first <= fill[0] and offer.transfer not in self._transfers

    def _begin(self, arrival: Arrival, numbers: list[int], transfer_id: int) -> None:
        self._transfers[transfer_id] = Transfer(arrival, numbers)
        arrival.transfers.add(transfer_id)

    def _cancel(self, transfer_id: int) -> None:
        transfer = self._transfers.pop(transfer_id)
        transfer.arrival.transfers.discard(transfer_id)
        self.pulls = [pull for pull in self.pulls if pull.transfer != transfer_id]
        if transfer.pulled:
            self.cancelled.append(transfer_id)
