"""The connector between processes: the decode side reads what the prefill side has put on offer.

On one host it reads the file of the transfer in shared memory; from another host it gets the same
bytes over HTTP, from the process that has the file. Both are done by threads, so that others
are computed meanwhile. The bytes lie in memory of the reader's own before they are checked, so
nobody can change them afterwards.
"""

from __future__ import annotations

import http.client
import io
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import jax
import msgspec
import numpy as np

from pshare_jax.core.buckets import TRANSFER_BUCKETS, pieces
from pshare_jax.core.connector import TransferError, TransferState, check_descriptors
from pshare_jax.core.messages import PageDescriptor
from pshare_jax.core.plans import Offer, Pull
from pshare_jax.kv.offers import PREFIX, OfferFolder, take
from pshare_jax.kv.pieces import (
    check_contents,
    describe,
    gather_pieces,
    page_descriptor,
    scatter_pieces,
)
from pshare_jax.runtime.pool import PagePool
from pshare_jax.runtime.programs import Programs

HTTP_SECONDS = 10.0
"""How long another host may let a read wait."""

READERS = 2
"""Threads that read."""


class Address(msgspec.Struct, frozen=True):
    """Where a process has its offers: a folder, for those on the same host, and a URL."""

    worker: str
    folder: str
    url: str

    def encode(self) -> str:
        """As text, for messages."""
        return msgspec.json.encode(self).decode()


@dataclass
class _Arriving:
    """A transfer that was accepted.

    `reading` gives its pieces as they are read, in the host's memory; then they are put on the mesh
    as `staged`, with their `checksums`.
    """

    pull: Pull
    reading: Future[list[np.ndarray]]
    staged: list[jax.Array] = field(default_factory=list)
    checksums: list[jax.Array] | None = None


class RemotePages:
    """A worker's end. Arguments beside its name, programs and pool:

    Args:
        worker: whose end it is.
        programs: of its mesh.
        pool: its pages.
        offers: what the process has on offer.
        url: where other hosts reach this process.
        token: that the processes of the cluster know each other by.
        clock: seconds, from any start.
    """

    def __init__(
        self,
        worker: str,
        programs: Programs,
        pool: PagePool,
        offers: OfferFolder,
        url: str = "",
        token: str = "",
        clock: Callable[[], float] = time.monotonic,
    ):
        self.address = Address(worker, str(offers.path), url).encode()
        self._worker = worker
        self._programs = programs
        self._pool = pool
        self._offers = offers
        self._token = token
        self._clock = clock
        self._arriving: dict[int, _Arriving] = {}
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix=f"{worker}-pages")

    @property
    def num_arriving(self) -> int:
        """Transfers that were accepted and have not ended."""
        return len(self._arriving)

    def offer(self, offer: Offer) -> list[PageDescriptor]:
        """See `Connector.offer`."""
        staged, checksums = gather_pieces(self._programs, self._pool, offer.pages)
        host = [np.asarray(piece) for piece in staged]
        self._offers.put(offer.transfer, self._worker, host, len(offer.pages), self._clock())
        return describe(self._programs.layout, offer.keys, checksums)

    def accept(self, pull: Pull) -> None:
        """See `Connector.accept`."""
        where = f"transfer {pull.transfer}"
        if pull.transfer in self._arriving:
            raise TransferError(f"{where}: nothing is on offer")
        check_descriptors(pull, page_descriptor(self._programs.layout))
        if len(pull.targets) != len(pull.keys):
            raise TransferError(
                f"{where}: {len(pull.keys)} pages are on offer for {len(pull.keys)} keys and "
                f"{len(pull.targets)} places"
            )
        try:
            address = msgspec.json.decode(pull.address, type=Address)
        except msgspec.DecodeError:
            raise TransferError(f"{where}: {pull.address!r} is no address") from None
        if address.worker != pull.source:
            raise TransferError(f"{where}: {address.worker} offers it, not {pull.source}")
        self._arriving[pull.transfer] = _Arriving(pull, self._read(pull, address))

    def poll(self, transfer: int) -> TransferState:
        """See `Connector.poll`."""
        arriving = self._get(transfer)
        if not arriving.reading.done():
            return TransferState.ARRIVING
        checksums = self._put(arriving)
        there = all(array.is_ready() for array in checksums)  # pyright: ignore[reportAttributeAccessIssue]
        return TransferState.READY if there else TransferState.ARRIVING

    def commit(self, transfer: int) -> None:
        """See `Connector.commit`."""
        arriving = self._get(transfer)
        checksums = self._put(arriving)
        del self._arriving[transfer]
        check_contents(arriving.pull, checksums)
        scatter_pieces(self._programs, self._pool, arriving.staged, arriving.pull.targets)

    def abort(self, transfer: int) -> None:
        """See `Connector.abort`."""
        self._offers.drop(transfer)
        # What is being read is read to its end, which closes the file, and then lost.
        self._arriving.pop(transfer, None)

    def close(self) -> None:
        """Ends the threads; what they read is lost."""
        self._readers.shutdown(wait=False)

    def _read(self, pull: Pull, address: Address) -> Future[list[np.ndarray]]:
        """Begins to read what is on offer."""
        folder = Path(address.folder)
        count = len(pull.keys)
        # The name is the owner's word: a folder of offers it must be, and lie where ours does.
        if folder.name.startswith(PREFIX) and folder.parent == self._offers.path.parent:
            if folder.exists():
                file = take(folder, pull.transfer)
                try:
                    self._check_size(pull.transfer, os.fstat(file).st_size, count)
                except TransferError:
                    os.close(file)
                    raise
                return self._readers.submit(self._read_file, pull.transfer, file, count)
            if not address.url:
                raise TransferError(f"transfer {pull.transfer}: nothing is on offer")
        return self._readers.submit(self._read_url, pull.transfer, address.url, count)

    def _read_file(self, transfer: int, descriptor: int, count: int) -> list[np.ndarray]:
        with os.fdopen(descriptor, "rb", buffering=0) as source:
            return self._pieces(transfer, source, count)

    def _read_url(self, transfer: int, url: str, count: int) -> list[np.ndarray]:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(
            parts.hostname or "", parts.port, timeout=HTTP_SECONDS
        )
        try:
            headers = {"Authorization": f"Bearer {self._token}"}
            connection.request("GET", f"/pages/{transfer:016x}", headers=headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise TransferError(f"transfer {transfer}: nothing is on offer ({answer.status})")
            self._check_size(transfer, answer.length or 0, count)
            return self._pieces(transfer, answer, count)
        except (OSError, http.client.HTTPException) as error:
            raise TransferError(f"transfer {transfer}: {url} does not answer: {error}") from error
        finally:
            connection.close()

    def _check_size(self, transfer: int, size: int, count: int) -> None:
        """Checks that as many bytes are on offer as `count` pages have."""
        page = self._programs.layout.bytes_per_page
        if size != count * page:
            found = f"{size // page} pages are" if size % page == 0 else f"{size} bytes are"
            raise TransferError(
                f"transfer {transfer}: {found} on offer for {count} keys and {count} places"
            )

    def _pieces(
        self, transfer: int, source: io.RawIOBase | http.client.HTTPResponse, count: int
    ) -> list[np.ndarray]:
        """Reads pieces, padded with zeros."""
        layout = self._programs.layout
        read = []
        for length, bucket in pieces(count, TRANSFER_BUCKETS):
            piece = np.zeros(self._programs.staged_shape(bucket), layout.dtype)
            for layer in piece:
                _fill(transfer, source, memoryview(layer[:length].view(np.uint8).reshape(-1)))
            read.append(piece)
        return read

    def _put(self, arriving: _Arriving) -> list[jax.Array]:
        """Puts what was read on the mesh, once; waits for the reading."""
        if arriving.checksums is None:
            transfer = arriving.pull.transfer
            try:
                pieces_read = arriving.reading.result()
            except TransferError:
                del self._arriving[transfer]
                raise
            except OSError as error:
                del self._arriving[transfer]
                raise TransferError(f"transfer {transfer}: it cannot be read: {error}") from error
            staging = self._programs.staging
            arriving.staged = [jax.device_put(piece, staging) for piece in pieces_read]
            arriving.checksums = [self._programs.checksum(piece) for piece in arriving.staged]
        return arriving.checksums

    def _get(self, transfer: int) -> _Arriving:
        arriving = self._arriving.get(transfer)
        if arriving is None:
            raise TransferError(f"transfer {transfer} was not accepted, or has ended")
        return arriving


def _fill(transfer: int, source: io.RawIOBase | http.client.HTTPResponse, into: memoryview) -> None:
    while into:
        count = source.readinto(into)
        if not count:
            raise TransferError(f"transfer {transfer}: it ends too early")
        into = into[count:]
