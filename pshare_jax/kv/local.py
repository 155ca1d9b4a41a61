"""Connectors within one process: between meshes, and within one pool.

`DevicePut` moves pages: gather on the sending mesh, `jax.device_put`, scatter on the receiving one.
`SamePool` has nothing to move where prefill and decode share a pool: full pages are shared by
reference, and only the half-filled end of a prompt, which a decode module goes on writing in, is
copied.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax
import numpy as np

from pshare_jax.core.connector import TransferError, TransferState, check_descriptors
from pshare_jax.core.messages import PageDescriptor
from pshare_jax.core.plans import Offer, Pull
from pshare_jax.kv.pieces import (
    check_contents,
    describe,
    gather_pieces,
    padded,
    page_descriptor,
    scatter_pieces,
)
from pshare_jax.runtime.pool import PagePool, Pages
from pshare_jax.runtime.programs import Programs


@dataclass(frozen=True)
class _OnOffer:
    """Staged pages, a piece each call of the gather, or pages of the pool itself."""

    worker: str
    staged: list[jax.Array]
    pages: list[int]


class Exchange:
    """What is on offer in this process, by transfer. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._offers: dict[int, _OnOffer] = {}

    def __len__(self) -> int:
        return len(self._offers)

    def put(self, transfer: int, offer: _OnOffer) -> None:
        """Offers pages.

        Raises:
            TransferError: there is an offer of that id.
        """
        with self._lock:
            if transfer in self._offers:
                raise TransferError(f"transfer {transfer} is on offer already")
            self._offers[transfer] = offer

    def take(self, transfer: int) -> _OnOffer:
        """Takes an offer.

        Raises:
            TransferError: there is none.
        """
        with self._lock:
            offer = self._offers.pop(transfer, None)
        if offer is None:
            raise TransferError(f"transfer {transfer}: nothing is on offer")
        return offer

    def drop(self, transfer: int) -> None:
        """Forgets an offer, if there is one."""
        with self._lock:
            self._offers.pop(transfer, None)

    def drop_worker(self, worker: str) -> None:
        """Forgets all offers of a worker that has failed."""
        with self._lock:
            for transfer in [t for t, o in self._offers.items() if o.worker == worker]:
                del self._offers[transfer]


@dataclass
class _Arriving:
    """A transfer that was accepted: its pages as they lie here, and checksums of each piece."""

    pull: Pull
    offer: _OnOffer
    checksums: list[jax.Array]


class _End(ABC):
    """What the ends have in common: accounts of what is on offer, and of what was accepted.

    Args:
        worker: whose end it is.
        programs: of its mesh.
        pool: its pages.
        exchange: that of the process.
    """

    def __init__(self, worker: str, programs: Programs, pool: PagePool, exchange: Exchange):
        self._worker = worker
        self._programs = programs
        self._pool = pool
        self._exchange = exchange
        self._arriving: dict[int, _Arriving] = {}

    @property
    def num_arriving(self) -> int:
        """Transfers that were accepted and have not ended."""
        return len(self._arriving)

    def address_of(self, transfer: int) -> str:
        """See `Connector.address_of`."""
        return ""

    def accept(self, pull: Pull) -> None:
        """See `Connector.accept`."""
        offer = self._exchange.take(pull.transfer)
        check_descriptors(pull, page_descriptor(self._programs.layout))
        where = f"transfer {pull.transfer}"
        if offer.worker != pull.source:
            raise TransferError(f"{where}: {offer.worker} offers it, not {pull.source}")
        if not len(offer.pages) == len(pull.keys) == len(pull.targets):
            raise TransferError(
                f"{where}: {len(offer.pages)} pages are on offer for {len(pull.keys)} keys and "
                f"{len(pull.targets)} places"
            )
        self._arriving[pull.transfer] = self._begin(pull, offer)

    def poll(self, transfer: int) -> TransferState:
        """See `Connector.poll`."""
        checksums = self._get(transfer).checksums
        there = all(array.is_ready() for array in checksums)  # pyright: ignore[reportAttributeAccessIssue]
        return TransferState.READY if there else TransferState.ARRIVING

    def commit(self, transfer: int) -> None:
        """See `Connector.commit`."""
        arriving = self._get(transfer)
        del self._arriving[transfer]
        self._write(arriving)

    def abort(self, transfer: int) -> None:
        """See `Connector.abort`."""
        self._exchange.drop(transfer)
        self._arriving.pop(transfer, None)

    @abstractmethod
    def _begin(self, pull: Pull, offer: _OnOffer) -> _Arriving:
        """Begins to bring what is on offer, which has been checked."""

    @abstractmethod
    def _write(self, arriving: _Arriving) -> None:
        """Writes what has come into the pool, or raises a TransferError."""

    def _get(self, transfer: int) -> _Arriving:
        arriving = self._arriving.get(transfer)
        if arriving is None:
            raise TransferError(f"transfer {transfer} was not accepted, or has ended")
        return arriving


class DevicePut(_End):
    """An end that moves pages between meshes of one process. Arguments as of `_End`."""

    def offer(self, offer: Offer) -> list[PageDescriptor]:
        """See `Connector.offer`."""
        staged, checksums = gather_pieces(self._programs, self._pool, offer.pages)
        self._exchange.put(offer.transfer, _OnOffer(self._worker, staged, offer.pages))
        return describe(self._programs.layout, offer.keys, checksums)

    def _begin(self, pull: Pull, offer: _OnOffer) -> _Arriving:
        staged = [jax.device_put(piece, self._programs.staging) for piece in offer.staged]
        checksums = [self._programs.checksum(piece) for piece in staged]
        return _Arriving(pull, _OnOffer(offer.worker, staged, offer.pages), checksums)

    def _write(self, arriving: _Arriving) -> None:
        check_contents(arriving.pull, arriving.checksums)
        scatter_pieces(self._programs, self._pool, arriving.offer.staged, arriving.pull.targets)


class SamePool(_End):
    """Both ends, where prefill and decode use one pool. Arguments as of `_End`."""

    def offer(self, offer: Offer) -> list[PageDescriptor]:
        """See `Connector.offer`. Contents stay where they are, so nothing is summed up."""
        self._exchange.put(offer.transfer, _OnOffer(self._worker, [], offer.pages))
        return describe(self._programs.layout, offer.keys, [0] * len(offer.pages))

    def _begin(self, pull: Pull, offer: _OnOffer) -> _Arriving:
        if offer.worker != self._worker:
            raise TransferError(
                f"transfer {pull.transfer}: the pages of {offer.worker} are in another pool than "
                f"those of {self._worker}"
            )
        return _Arriving(pull, offer, [])

    def _write(self, arriving: _Arriving) -> None:
        for source, target in zip(arriving.offer.pages, arriving.pull.targets, strict=True):
            src, dst = padded([source], 1), padded([target], 1)

            def copy(
                pages: Pages, src: np.ndarray = src, dst: np.ndarray = dst
            ) -> tuple[Pages, None]:
                return self._programs.copy(pages, src, dst), None

            self._pool.update(copy)
