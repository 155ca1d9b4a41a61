"""Connectors within one process: between meshes, and within one pool.

`DevicePut` moves pages: gather on the sending mesh, `jax.device_put`, scatter on the receiving one.
`SamePool` has nothing to move where prefill and decode share a pool: full pages are shared by
reference, and only the half-filled end of a prompt, which a decode module goes on writing in, is
copied.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import jax
import numpy as np

from pshare_jax.core.buckets import TRANSFER_BUCKETS, pieces
from pshare_jax.core.connector import TransferError, TransferState, check_descriptors
from pshare_jax.core.messages import PageDescriptor
from pshare_jax.core.plans import Offer, Pull
from pshare_jax.runtime.layout import PageLayout
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


def page_descriptor(layout: PageLayout) -> PageDescriptor:
    """What every page of a layout looks like, but for its key and contents."""
    return PageDescriptor(
        key=b"",
        layers=(0, layout.num_layers),
        shape=layout.layer_shape(1)[1:],
        dtype=np.dtype(layout.dtype).name,
    )


def describe(layout: PageLayout, keys: list[bytes], checksums: list[int]) -> list[PageDescriptor]:
    """Descriptors of pages of a pool."""
    one = page_descriptor(layout)
    return [
        PageDescriptor(key, one.layers, one.shape, one.dtype, one.codec, checksum)
        for key, checksum in zip(keys, checksums, strict=True)
    ]


@dataclass
class _Arriving:
    pull: Pull
    staged: list[jax.Array]
    checksums: list[jax.Array]


class DevicePut:
    """An end that moves pages between meshes of one process.

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

    def offer(self, offer: Offer) -> list[PageDescriptor]:
        """See `Connector.offer`."""
        staged, checksums, start = [], [], 0
        for length, bucket in pieces(len(offer.pages), TRANSFER_BUCKETS):
            indices = _padded(offer.pages[start : start + length], bucket)
            piece = self._gather(indices)
            staged.append(piece)
            checksums.append((length, self._programs.checksum(piece)))
            start += length
        self._exchange.put(offer.transfer, _OnOffer(self._worker, staged, offer.pages))
        values = [int(v) for length, sums in checksums for v in np.asarray(sums)[:length]]
        return describe(self._programs.layout, offer.keys, values)

    def accept(self, pull: Pull) -> None:
        """See `Connector.accept`."""
        offer = self._exchange.take(pull.transfer)
        check_descriptors(pull, page_descriptor(self._programs.layout))
        if len(offer.pages) != len(pull.targets):
            raise TransferError(
                f"transfer {pull.transfer}: {len(offer.pages)} pages are on offer for "
                f"{len(pull.targets)} places"
            )
        staged = [jax.device_put(piece, self._programs.staging) for piece in offer.staged]
        checksums = [self._programs.checksum(piece) for piece in staged]
        self._arriving[pull.transfer] = _Arriving(pull, staged, checksums)

    def poll(self, transfer: int) -> TransferState:
        """See `Connector.poll`."""
        checksums = self._get(transfer).checksums
        there = all(array.is_ready() for array in checksums)  # pyright: ignore[reportAttributeAccessIssue]
        return TransferState.READY if there else TransferState.ARRIVING

    def commit(self, transfer: int) -> None:
        """See `Connector.commit`."""
        arriving = self._get(transfer)
        del self._arriving[transfer]
        pull, start = arriving.pull, 0
        for piece, sums in zip(arriving.staged, arriving.checksums, strict=True):
            bucket = piece.shape[1]
            descriptors = pull.descriptors[start : start + bucket]
            for i, (found, said) in enumerate(zip(np.asarray(sums), descriptors, strict=False)):
                if int(found) != said.checksum:
                    raise TransferError(
                        f"transfer {transfer}, page {start + i}: its checksum is {int(found):08x}, "
                        f"but {said.checksum:08x} was offered"
                    )
            start += len(descriptors)
        self._store(pull.targets, arriving.staged)

    def abort(self, transfer: int) -> None:
        """See `Connector.abort`."""
        self._exchange.drop(transfer)
        self._arriving.pop(transfer, None)

    def _gather(self, indices: np.ndarray) -> jax.Array:
        return self._pool.read(lambda pages: self._programs.gather(pages, indices))

    def _get(self, transfer: int) -> _Arriving:
        arriving = self._arriving.get(transfer)
        if arriving is None:
            raise TransferError(f"transfer {transfer} was not accepted, or has ended")
        return arriving

    def _store(self, targets: list[int], staged: list[jax.Array]) -> None:
        start = 0
        for piece in staged:
            bucket = piece.shape[1]
            indices = _padded(targets[start : start + bucket], bucket)
            start += bucket

            def scatter(
                pages: Pages, piece: jax.Array = piece, indices: np.ndarray = indices
            ) -> tuple[Pages, None]:
                return self._programs.scatter(pages, piece, indices), None

            self._pool.update(scatter)


class SamePool:
    """Both ends, where prefill and decode use one pool. Arguments as of `DevicePut`."""

    def __init__(self, worker: str, programs: Programs, pool: PagePool, exchange: Exchange):
        self._worker = worker
        self._programs = programs
        self._pool = pool
        self._exchange = exchange
        self._arriving: dict[int, tuple[Pull, list[int]]] = {}

    def offer(self, offer: Offer) -> list[PageDescriptor]:
        """See `Connector.offer`. Contents stay where they are, so nothing is summed up."""
        self._exchange.put(offer.transfer, _OnOffer(self._worker, [], offer.pages))
        return describe(self._programs.layout, offer.keys, [0] * len(offer.pages))

    def accept(self, pull: Pull) -> None:
        """See `Connector.accept`."""
        offer = self._exchange.take(pull.transfer)
        check_descriptors(pull, page_descriptor(self._programs.layout))
        if offer.worker != pull.source:
            raise TransferError(
                f"transfer {pull.transfer}: {offer.worker} offers it, not {pull.source}"
            )
        self._arriving[pull.transfer] = (pull, offer.pages)

    def poll(self, transfer: int) -> TransferState:
        """See `Connector.poll`."""
        self._get(transfer)
        return TransferState.READY

    def commit(self, transfer: int) -> None:
        """See `Connector.commit`."""
        pull, sources = self._get(transfer)
        del self._arriving[transfer]
        for source, target in zip(sources, pull.targets, strict=True):
            src, dst = _padded([source], 1), _padded([target], 1)

            def copy(
                pages: Pages, src: np.ndarray = src, dst: np.ndarray = dst
            ) -> tuple[Pages, None]:
                return self._programs.copy(pages, src, dst), None

            self._pool.update(copy)

    def abort(self, transfer: int) -> None:
        """See `Connector.abort`."""
        self._exchange.drop(transfer)
        self._arriving.pop(transfer, None)

    def _get(self, transfer: int) -> tuple[Pull, list[int]]:
        arriving = self._arriving.get(transfer)
        if arriving is None:
            raise TransferError(f"transfer {transfer} was not accepted, or has ended")
        return arriving


def _padded(pages: list[int], bucket: int) -> np.ndarray:
    """int32 page numbers, padded with the padding page 0 to length `bucket`."""
    indices = np.zeros(bucket, np.int32)
    indices[: len(pages)] = pages
    return indices
