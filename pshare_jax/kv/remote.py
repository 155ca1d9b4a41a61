"""The connector between processes: the decode side reads what the prefill side has put on offer.

On one host it reads the file of the transfer in shared memory; from another host it gets the same
bytes over HTTP, from the process that has the file; or it pulls the arrays themselves, see
`kv.direct`. All of that is done by threads, so that others are computed meanwhile; it begins when
the process hears that pages are on offer, and the engine is told when they are there. The bytes lie
in memory of the reader's own before they are checked, so nobody can change them afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import jax
import msgspec
import numpy as np

from pshare_jax.config import KvCodec, Transport
from pshare_jax.core.buckets import TRANSFER_BUCKETS, pieces
from pshare_jax.core.connector import TransferError, TransferState, check_descriptors
from pshare_jax.core.messages import PageDescriptor
from pshare_jax.core.plans import Offer, Pull
from pshare_jax.kv.ahead import Found, ReadAhead
from pshare_jax.kv.coding import usable_codecs
from pshare_jax.kv.direct import DirectOffers
from pshare_jax.kv.links import Links
from pshare_jax.kv.offers import OfferFolder, take
from pshare_jax.kv.peers import Peers
from pshare_jax.kv.pieces import (
    check_contents,
    describe,
    gather_pieces,
    page_descriptor,
    scatter_pieces,
)
from pshare_jax.kv.pulling import PagePuller
from pshare_jax.kv.reading import PageReader, Read
from pshare_jax.kv.records import Records
from pshare_jax.kv.traffic import Traffic
from pshare_jax.kv.ways import Address, Reader, Way, choose, is_here
from pshare_jax.runtime.pool import PagePool
from pshare_jax.runtime.programs import Programs

READERS = 2
"""Threads that read from other processes, and as many that read files of this host: these are
quick, and do not wait for those that wait for others."""

SOON_SECONDS = 0.01
"""How long the engine waits for files of this host, those of a plan together, which are read in
less time than it would be busy with anything else; what takes longer comes beside its work."""

AVOID_SECONDS = 30.0
"""How long nothing is pulled directly from a worker from which that has failed."""

Pieces = list[jax.Array]


@dataclass
class _Arriving:
    """A transfer that was accepted, on its `way`.

    `reading` gives its pieces once they have been read, in the host's memory or on the mesh; then
    they are on the mesh as `staged`, with their `checksums`. `coded` is the way that they came on
    coded, if they did.
    """

    pull: Pull
    way: Way
    reading: Future[Found]
    coded: str = ""
    staged: Pieces = field(default_factory=list)
    checksums: Pieces | None = None


class RemotePages:
    """A worker's end. Arguments beside its name, programs and pool:

    Args:
        worker: whose end it is.
        programs: of its mesh.
        pool: its pages.
        offers: what the process has on offer in shared memory.
        url: where other hosts reach this process.
        peers: asks other processes over HTTP; without a secret unless given.
        direct: what the process has on offer for `jax.experimental.transfer`; None is nothing.
        transport: see `config.ClusterConfig`.
        codec: see `config.ClusterConfig`.
        clock: seconds, from any start.

    Attributes:
        moved: transfers that were written into the pool, by their way.
        traffic: what has come, and how.
        on_arrival: called, in any thread, when a transfer has been read or is not to be read any
            more; must not call this end.

    Raises:
        ConfigError: `codec` names one that is not for these pages.
    """

    def __init__(
        self,
        worker: str,
        programs: Programs,
        pool: PagePool,
        offers: OfferFolder,
        url: str = "",
        peers: Peers | None = None,
        direct: DirectOffers | None = None,
        transport: Transport = "auto",
        codec: KvCodec = "auto",
        clock: Callable[[], float] = time.monotonic,
    ):
        self.moved: dict[Way, int] = {"shm": 0, "http": 0, "jax-transfer": 0}
        self._worker = worker
        self._programs = programs
        self._pool = pool
        self._offers = offers
        self._url = url
        self._direct = direct
        self._transport: Transport = transport
        self._clock = clock
        self._ways: dict[int, Way] = {}
        self._arriving: dict[int, _Arriving] = {}
        self._ahead = ReadAhead()
        self.on_arrival: Callable[[], None] = lambda: None
        # On several devices all threads must run the same programs in the same order.
        self._stages_beside = programs.mesh.size == 1
        self._avoided: dict[str, float] = {}
        peers, layout = peers or Peers(), programs.layout
        shape = (layout.num_layers, *layout.layer_shape(1)[1:])
        codecs = usable_codecs(codec, shape, np.dtype(layout.dtype).name)
        self.traffic = Traffic()
        self._peers = peers
        self._reader = PageReader(layout, peers, Links(codec, codecs), self.traffic, clock)
        self._puller = PagePuller(layout, programs.staging, peers, codec, codecs, self.traffic)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix=f"{worker}-pages")
        self._file_readers = ThreadPoolExecutor(READERS, thread_name_prefix=f"{worker}-files")
        self._soon: float | None = None

    @property
    def records(self) -> Records | None:
        """How pages lie in arrays that are pulled coded; None where they are not coded."""
        return self._puller.records

    @property
    def num_arriving(self) -> int:
        """Transfers that were accepted and have not ended."""
        return len(self._arriving)

    def reader(self, source: str) -> str:
        """What to tell a worker that is asked for pages, see `messages.Fetch`."""
        avoided = self._avoided.get(source)
        if avoided is not None and self._clock() >= avoided:
            del self._avoided[source]
            avoided = None
        direct = self._direct is not None and self._direct.usable and avoided is None
        return Reader(str(self._offers.path), direct).encode()

    def offer(self, offer: Offer) -> list[PageDescriptor]:
        """See `Connector.offer`."""
        if offer.transfer in self._ways:
            raise TransferError(f"transfer {offer.transfer} is on offer already")
        direct = self._direct is not None and self._direct.usable
        way = choose(self._transport, offer.reader, self._offers.path, direct=direct)
        staged, checksums = gather_pieces(self._programs, self._pool, offer.pages)
        if way == "jax-transfer" and self._direct is not None:
            self._direct.put(offer.transfer, self._worker, staged, len(offer.pages))
        else:
            host = [np.asarray(piece) for piece in staged]
            self._offers.put(offer.transfer, self._worker, host, len(offer.pages), self._clock())
        self._ways[offer.transfer] = way
        return describe(self._programs.layout, offer.keys, checksums)

    def address_of(self, transfer: int) -> str:
        """See `Connector.address_of`."""
        way = self._ways.get(transfer, "shm")
        return Address(self._worker, way, str(self._offers.path), self._url).encode()

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
        count = len(pull.keys)
        reading = self._ahead.take(pull.transfer, pull.address, self._size(count))
        if reading is None:
            reading = self._read(pull.transfer, count, address)
        self._arriving[pull.transfer] = _Arriving(pull, address.way, reading)
        if address.way == "shm":
            # Until the next `poll`, which comes after all that is to be accepted at once.
            now = self._clock()
            self._soon = now + SOON_SECONDS if self._soon is None else self._soon
            wait([reading], max(self._soon - now, 0.0))

    def read_ahead(self, transfer: int, address: str, count: int) -> None:
        """Begins to read `count` pages that are on offer before their transfer is accepted; for any
        thread. What is wrong with it is said when it is."""
        with contextlib.suppress(TransferError, msgspec.DecodeError):
            where = msgspec.json.decode(address, type=Address)
            self._ahead.begin(
                transfer,
                address,
                self._size(count),
                self._clock(),
                lambda: self._read(transfer, count, where),
            )

    def has_arrived(self) -> bool:
        """Whether `poll` has something new to say of a transfer."""
        return any(
            _is_ready(arriving.checksums)
            for arriving in self._arriving.values()
            if arriving.reading.done()
        )

    def poll(self, transfer: int) -> TransferState:
        """See `Connector.poll`."""
        self._soon = None
        arriving = self._get(transfer)
        if not arriving.reading.done():
            return TransferState.ARRIVING
        checksums = self._put(arriving)
        return TransferState.READY if _is_ready(checksums) else TransferState.ARRIVING

    def commit(self, transfer: int) -> None:
        """See `Connector.commit`."""
        arriving = self._get(transfer)
        checksums = self._put(arriving)
        del self._arriving[transfer]
        try:
            check_contents(arriving.pull, checksums)
        except TransferError:
            self._failed(arriving)
            if arriving.coded:
                way = self._puller if arriving.way == "jax-transfer" else self._reader
                way.coded.refuse(arriving.coded, "checksum")
            raise
        scatter_pieces(self._programs, self._pool, arriving.staged, arriving.pull.targets)
        self.moved[arriving.way] += 1

    def abort(self, transfer: int) -> None:
        """See `Connector.abort`."""
        if self._ways.pop(transfer, None) == "jax-transfer" and self._direct is not None:
            self._direct.drop(transfer)
        self._offers.drop(transfer)
        # A file that is being read is read to its end, which closes it, and then lost.
        arriving = self._arriving.pop(transfer, None)
        if arriving is not None:
            arriving.reading.cancel()
        self._ahead.drop(transfer)
        self._peers.stop(transfer)

    def close(self) -> None:
        """Ends the threads; what they read is lost, and nothing more is read."""
        self._readers.shutdown(wait=False)
        self._file_readers.shutdown(wait=False)

    def _size(self, count: int) -> int:
        """Bytes of so many pages in pieces, padding included."""
        padded = sum(bucket for _, bucket in pieces(count, TRANSFER_BUCKETS))
        return padded * self._programs.layout.bytes_per_page

    def _read(self, transfer: int, count: int, address: Address) -> Future[Found]:
        """Begins to read what is on offer.

        Raises:
            TransferError: it is not there, is not what was asked for, or this end is closed.
        """
        reader = self._reader
        if address.way == "jax-transfer":
            if self._direct is None:
                raise TransferError(f"transfer {transfer}: it is not to be pulled directly here")
            pull = functools.partial(self._pull, self._direct, transfer, address.url, count)
            return self._begin(self._readers, transfer, pull)
        if address.way == "shm":
            if is_here(address.folder, self._offers.path):
                file = take(Path(address.folder), transfer)
                read = functools.partial(reader.from_file, transfer, file, count)
                try:
                    reader.check_size(transfer, os.fstat(file).st_size, count)
                    reading = self._begin(self._file_readers, transfer, read)
                except TransferError:
                    os.close(file)
                    raise
                # Nobody closes the file of one that is given up before a thread gets to it.
                reading.add_done_callback(lambda done: os.close(file) if done.cancelled() else None)
                return reading
            if not address.url:
                raise TransferError(f"transfer {transfer}: nothing is on offer")
        fetch = functools.partial(reader.from_url, transfer, address.url, count)
        return self._begin(self._readers, transfer, fetch)

    def _begin(
        self, threads: ThreadPoolExecutor, transfer: int, read: Callable[[], Read]
    ) -> Future[Found]:
        """Has a thread read, and tell of it."""
        try:
            reading = threads.submit(self._found, read)
        except RuntimeError:
            raise TransferError(f"transfer {transfer}: {self._worker} reads no more") from None
        reading.add_done_callback(lambda _: self.on_arrival())
        return reading

    def _found(self, read: Callable[[], Read]) -> Found:
        found = Found(read())
        if self._stages_beside:
            # The engine may compute meanwhile, with all threads of its kernels.
            self._stage(found, self._programs.checksum_beside)
            jax.block_until_ready((found.staged, found.checksums))
        return found

    def _stage(self, found: Found, checksum: Callable[[jax.Array], jax.Array]) -> None:
        """Puts what was read on the mesh."""
        found.staged = [self._programs.stage(piece) for piece in found.read.pieces]
        found.checksums = [checksum(piece) for piece in found.staged]
        found.read = Read((), found.read.coded)

    def _pull(self, direct: DirectOffers, transfer: int, url: str, count: int) -> Read:
        """Claims a transfer, and pulls it onto the mesh."""
        found = self._puller.pull(direct, transfer, url, count)
        # Nobody waits for it; who is not told keeps it on the books for a while.
        with contextlib.suppress(RuntimeError):  # once this end is closed
            self._readers.submit(self._puller.settle, url, transfer)
        return found

    def _put(self, arriving: _Arriving) -> Pieces:
        """Puts what was read on the mesh, once; waits for the reading."""
        if arriving.checksums is None:
            transfer = arriving.pull.transfer
            try:
                found = arriving.reading.result()
            except TransferError:
                del self._arriving[transfer]
                self._failed(arriving)
                raise
            except (OSError, ValueError, ArithmeticError) as error:
                # What a wrong process says must not end this one.
                del self._arriving[transfer]
                raise TransferError(f"transfer {transfer}: it cannot be read: {error}") from error
            if found.checksums is None:
                self._stage(found, self._programs.checksum)
            assert found.checksums is not None
            arriving.coded = found.read.coded
            arriving.staged, arriving.checksums = found.staged, found.checksums
        return arriving.checksums

    def _failed(self, arriving: _Arriving) -> None:
        """What could not be had directly is asked for in another way the next time."""
        if arriving.way == "jax-transfer":
            self._avoided[arriving.pull.source] = self._clock() + AVOID_SECONDS

    def _get(self, transfer: int) -> _Arriving:
        arriving = self._arriving.get(transfer)
        if arriving is None:
            raise TransferError(f"transfer {transfer} was not accepted, or has ended")
        return arriving


def _is_ready(checksums: Pieces | None) -> bool:
    """Whether there is nothing to wait for: all are computed, or none has been asked for."""
    return checksums is None or all(
        array.is_ready()  # pyright: ignore[reportAttributeAccessIssue]
        for array in checksums
    )
