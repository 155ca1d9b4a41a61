"""Reads what other processes have on offer into the host's memory: from files, and over HTTP.

Coded pages come over HTTP as frames, one a page: the record's length (32 bits), its xxh3 digest (64
bits), both little-endian, and the record. One that is as long as a page is the page as it is.
Before the first comes the codebook, if the answer says so. Nothing that is read is believed: see
`kv.remote` for what is checked afterwards.
"""

from __future__ import annotations

import http.client
import io
import os
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
import xxhash

from pshare_jax.core.arrivals import TRANSFER_SECONDS
from pshare_jax.core.buckets import TRANSFER_BUCKETS, pieces
from pshare_jax.core.connector import TransferError
from pshare_jax.kernels.kv_codec.api import page_codec
from pshare_jax.kv.coded_way import CodedWay
from pshare_jax.kv.coding import HEADER, Coding, CodingError, Wanted, read_coding
from pshare_jax.kv.links import Links
from pshare_jax.kv.peers import Peers
from pshare_jax.kv.traffic import Traffic
from pshare_jax.runtime.layout import PageLayout

HEAD = struct.Struct("<IQ")
"""Of a frame: length and digest of its record."""

_PART = 256 * 1024
"""Bytes between two looks at the clock, at most."""


@dataclass(frozen=True)
class Read:
    """Pieces of a transfer, in the host's memory or on the mesh; `coded` is the URL from which they
    came coded, or empty."""

    pieces: Sequence[np.ndarray | jax.Array]
    coded: str = ""


class PageReader:
    """Reads the pieces of transfers for one worker. Thread-safe.

    Args:
        layout: of its pages.
        peers: asks other processes.
        links: knows whether pages had better come coded.
        traffic: counts what has come.
        clock: seconds, from any start.

    Attributes:
        coded: what is known of pages that come coded.
    """

    def __init__(
        self,
        layout: PageLayout,
        peers: Peers,
        links: Links,
        traffic: Traffic,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._clock = clock
        self._layout = layout
        self._peers = peers
        self._shape = (layout.num_layers, *layout.layer_shape(1)[1:])
        self._links = links
        self._traffic = traffic
        self.coded = CodedWay(self._shape, links, traffic)

    def from_file(self, transfer: int, descriptor: int, count: int) -> Read:
        """Reads `count` pages from a file, and closes it.

        Raises:
            TransferError: it ends too early.
        """
        with os.fdopen(descriptor, "rb", buffering=0) as source:
            read = Read(self._plain(_Stream(transfer, source, self._clock), count))
        size = count * self._layout.bytes_per_page
        self._traffic.came("shm", "raw", size, size)
        return read

    def from_url(self, transfer: int, url: str, count: int) -> Read:
        """Reads `count` pages from the process at `url`.

        Raises:
            TransferError: they are not there, or not what was asked for.
        """
        wanted = self._links.wanted(url, count, self._layout.bytes_per_page)
        try:
            with self._peers.get_pages(url, transfer, wanted) as answer:
                return self._answer(transfer, url, answer, wanted, count)
        except CodingError as error:
            self.coded.refuse(url, error.reason)
            raise

    def _answer(
        self,
        transfer: int,
        url: str,
        answer: http.client.HTTPResponse,
        wanted: Wanted | None,
        count: int,
    ) -> Read:
        size = count * self._layout.bytes_per_page
        coding = read_coding(answer.headers.get(HEADER))
        self._links.heard(url, coding)
        started, stream = time.perf_counter(), _Stream(transfer, answer, self._clock)
        if coding is None or not coding.coded:
            self.check_size(transfer, answer.length or 0, count)
            read = Read(self._plain(stream, count))
            self._links.measured(url, size, time.perf_counter() - started, coded=False)
            self._traffic.came("http", "raw", size, size)
            return read
        found, wire, decoding = self._coded(transfer, stream, url, coding, wanted, count)
        seconds = time.perf_counter() - started
        self._links.measured(url, size, seconds, coded=True, decoding=decoding)
        self._traffic.came("http", coding.codec, size, wire)
        return Read(found, url)

    def check_size(self, transfer: int, size: int, count: int) -> None:
        """Checks that as many bytes are on offer as `count` pages have.

        Raises:
            TransferError: says what is on offer.
        """
        page = self._layout.bytes_per_page
        if size != count * page:
            found = f"{size // page} pages are" if size % page == 0 else f"{size} bytes are"
            raise TransferError(
                f"transfer {transfer}: {found} on offer for {count} keys and {count} places"
            )

    def _plain(self, stream: _Stream, count: int) -> list[np.ndarray]:
        """Reads pieces as they are, padded with zeros."""
        read = self._empty(count)
        for piece, (length, _) in zip(read, pieces(count, TRANSFER_BUCKETS), strict=True):
            for layer in piece:
                stream.fill(layer[:length].view(np.uint8).reshape(-1).data)
        return read

    def _coded(
        self,
        transfer: int,
        stream: _Stream,
        url: str,
        coding: Coding,
        wanted: Wanted | None,
        count: int,
    ) -> tuple[list[np.ndarray], int, float]:
        """Reads coded pieces; also the bytes that came, and seconds of decoding."""
        where, page_bytes = f"transfer {transfer}", self._layout.bytes_per_page
        book = self.coded.codebook(transfer, url, coding, wanted, stream.take)
        wire = book.table.nbytes if coding.table else 0
        codec, plain = page_codec(book), page_codec(None)
        read, buffer, decoding = self._empty(count), np.empty(page_bytes, np.uint8), 0.0
        for number, (piece, index) in enumerate(_places(count)):
            size, said = stream.head()
            if not 0 < size <= page_bytes:
                raise CodingError("record", f"{where}, page {number}: a record of {size} bytes")
            record = buffer[:size]
            stream.fill(record.data)
            started = time.perf_counter()
            if xxhash.xxh3_64_intdigest(record.data) != said:
                raise CodingError("record", f"{where}, page {number}: its digest is another one")
            try:
                # One that does not shrink comes as it is.
                (plain if size == page_bytes else codec).decode(record, read[piece], index)
            except ValueError as error:
                raise CodingError("record", f"{where}, page {number}: {error}") from None
            decoding += time.perf_counter() - started
            wire += HEAD.size + size
        if stream.has_more:
            raise CodingError("record", f"{where}: more follows after {count} pages")
        return read, wire, decoding

    def _empty(self, count: int) -> list[np.ndarray]:
        """Staging arrays of zeros for so many pages."""
        shape = self._shape
        return [
            np.zeros((shape[0], bucket, *shape[1:]), self._layout.dtype)
            for _, bucket in pieces(count, TRANSFER_BUCKETS)
        ]


def _places(count: int) -> list[tuple[int, int]]:
    """For each of `count` pages the number of its piece, and its place in that."""
    cut = enumerate(pieces(count, TRANSFER_BUCKETS))
    return [(number, index) for number, (length, _) in cut for index in range(length)]


class _Stream:
    """What a transfer is read from, for as long as anybody waits for it.

    Args:
        transfer: its id.
        source: of its bytes.
        clock: seconds, from any start.
    """

    def __init__(
        self,
        transfer: int,
        source: io.RawIOBase | http.client.HTTPResponse,
        clock: Callable[[], float],
    ):
        self._transfer = transfer
        # `readinto` of an answer waits until all has come, however slowly.
        self._read = getattr(source, "readinto1", source.readinto)
        self._clock = clock
        self._end = clock() + TRANSFER_SECONDS

    def fill(self, into: memoryview) -> None:
        """Reads so many bytes.

        Raises:
            TransferError: they do not come, or not in time.
        """
        while into:
            count = self._read(into[:_PART])
            if not count:
                raise TransferError(f"transfer {self._transfer}: it ends too early")
            if self._clock() > self._end:
                # Who has asked for it has given it up; others wait for the link, and this thread.
                raise TransferError(
                    f"transfer {self._transfer}: it has not come within {TRANSFER_SECONDS:g} s"
                )
            into = into[count:]

    def take(self, count: int) -> bytes:
        """Reads so many bytes, which are few."""
        data = bytearray(count)
        self.fill(memoryview(data))
        return bytes(data)

    def head(self) -> tuple[int, int]:
        """Reads the head of a frame: length and digest of its record."""
        return HEAD.unpack(self.take(HEAD.size))

    @property
    def has_more(self) -> bool:
        """Whether it goes on."""
        return bool(self._read(bytearray(1)))
