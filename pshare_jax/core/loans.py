"""Pages that a worker gives to one that covers a prompt which begins with them.

Any index may be asked: only pages that a prefill module wrote are in one, under keys that name what
they hold. Pages are copied out when they are put on offer, so they are held until then alone. An
offer is withdrawn once somebody says that it is done with, or after a while.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pshare_jax.core import messages as m
from pshare_jax.core.messages import Message, Outbox
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.plans import Offer, PrefillResult

LEASE_SECONDS = 30.0
"""After this an offer is withdrawn that nobody has said is done with: he may have died."""


@dataclass(eq=False)
class _Loan:
    """An offer to a prefill worker for the sequence `id`; `pages` are held until it is made."""

    id: int
    pages: list[int]
    until: float | None = None


class Loans:
    """What one worker lends.

    Args:
        name: of the worker.
        cache: its pages.
        outbox: where answers go.
    """

    def __init__(self, name: str, cache: PageCache, outbox: Outbox):
        self._name = name
        self._cache = cache
        self._outbox = outbox
        self._offers: list[Offer] = []
        self._loans: dict[int, _Loan] = {}
        self._ended: list[int] = []

    def __len__(self) -> int:
        """Offers that have not ended."""
        return len(self._loans)

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for pages that are there."""
        return bool(self._offers)

    def lend(self, wanted: m.Lend) -> None:
        """Puts on offer, with the next plan, as many of the pages as the index holds."""
        if wanted.transfer in self._loans:
            return
        nodes = self._cache.match(wanted.keys, wanted.tokens, ready=True)
        if not nodes:
            why = f"{self._name} does not have the pages of sequence {wanted.id}"
            self._say(wanted.worker, m.NotOffered(wanted.transfer, why, wanted.id))
            return
        pages = [node.page for node in nodes]
        self._loans[wanted.transfer] = _Loan(wanted.id, pages)
        keys = wanted.keys[: len(pages)]
        self._offers.append(Offer(wanted.transfer, wanted.worker, pages, keys, wanted.reader))

    def ids(self) -> set[int]:
        """Sequences for which pages are on offer."""
        return {loan.id for loan in self._loans.values()}

    def repaid(self, id: int, transfer: int | None = None) -> None:
        """A transfer, or all for a sequence, has come or is not wanted any more."""
        for number, loan in tuple(self._loans.items()):
            if loan.id == id and transfer in (None, number):
                self._end(number)

    def _end(self, transfer: int) -> None:
        loan = self._loans.pop(transfer)
        self._offers = [offer for offer in self._offers if offer.transfer != transfer]
        self._cache.release(loan.pages)
        self._ended.append(transfer)

    def expire(self, now: float) -> None:
        """Ends what nobody has said is done with; `now` is in seconds, from any start."""
        for transfer, loan in tuple(self._loans.items()):
            if loan.until is None:
                loan.until = now + LEASE_SECONDS
            elif now >= loan.until:
                self._end(transfer)

    def take_offers(self) -> list[Offer]:
        """What is to be put on offer now."""
        offers, self._offers = self._offers, []
        return offers

    def take_ended(self) -> list[int]:
        """Transfers that need not be on offer any more."""
        ended, self._ended = self._ended, []
        return ended

    def offered(self, offers: Iterable[Offer], result: PrefillResult) -> None:
        """Pages have been put on offer, or could not be; others than loans are passed over."""
        for offer in offers:
            loan = self._loans.get(offer.transfer)
            if loan is None:
                continue
            self._cache.release(loan.pages)
            loan.pages = []
            self._say(offer.target, offer_answer(offer, result, loan.id))
            if offer.transfer not in result.offered:
                del self._loans[offer.transfer]

    def release_all(self) -> None:
        """Gives all pages back, of sequences that nobody will end."""
        for loan in self._loans.values():
            self._cache.release(loan.pages)
        self._loans.clear()
        self._offers.clear()
        self._ended.clear()

    def _say(self, to: str, message: Message) -> None:
        self._outbox.append((to, message))


def offer_answer(offer: Offer, result: PrefillResult, id: int) -> m.Offered | m.NotOffered:
    """What he hears who has asked for the pages of `offer`, for the sequence `id`."""
    transfer = offer.transfer
    if transfer in result.offered:
        address = result.addresses.get(transfer, "")
        return m.Offered(transfer, result.offered[transfer], address, id)
    reason = result.not_offered.get(transfer, "the pages were not put on offer")
    return m.NotOffered(transfer, reason, id)
