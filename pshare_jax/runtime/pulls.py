"""Transfers as executors carry them out: those that are under way, and what is put on offer."""

from __future__ import annotations

from collections.abc import Iterable

from pshare_jax.core.connector import Connector, TransferError, TransferState
from pshare_jax.core.messages import PageDescriptor
from pshare_jax.core.plans import Landed, Offer, PrefillResult, Pull


class Pulls:
    """Transfers to one worker; belongs to the thread that owns its pool.

    Args:
        connector: the worker's end.
    """

    def __init__(self, connector: Connector):
        self.connector = connector
        self._pulling: list[int] = []

    def run(self, cancelled: Iterable[int], pulls: Iterable[Pull]) -> list[Landed]:
        """Ends and begins transfers, and writes those into the pool that have come.

        Args:
            cancelled: transfers, of either side, that are not wanted any more.
            pulls: transfers to begin.

        Returns:
            Those that have ended, well or not.
        """
        for transfer in cancelled:
            self.connector.abort(transfer)
            if transfer in self._pulling:
                self._pulling.remove(transfer)
        landed: list[Landed] = []
        for pull in pulls:
            try:
                self.connector.accept(pull)
                self._pulling.append(pull.transfer)
            except TransferError as error:
                landed.append(Landed(pull.transfer, str(error)))
        for transfer in tuple(self._pulling):
            try:
                if self.connector.poll(transfer) is TransferState.ARRIVING:
                    continue
                self.connector.commit(transfer)
                landed.append(Landed(transfer))
            except TransferError as error:
                landed.append(Landed(transfer, str(error)))
            self._pulling.remove(transfer)
        return landed


def make_offers(connector: Connector, offers: Iterable[Offer]) -> PrefillResult:
    """Puts pages on offer; what came of each."""
    offered: dict[int, list[PageDescriptor]] = {}
    refused: dict[int, str] = {}
    for offer in offers:
        try:
            offered[offer.transfer] = connector.offer(offer)
        except TransferError as error:
            refused[offer.transfer] = str(error)
    addresses = {transfer: connector.address_of(transfer) for transfer in offered}
    return PrefillResult(offered, refused, addresses=addresses)
