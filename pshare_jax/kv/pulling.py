"""Pulls what other processes have on offer from their devices, as it is or coded."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
from jax.sharding import Sharding

from pshare_jax.config import KvCodec
from pshare_jax.core.buckets import TRANSFER_BUCKETS, pieces
from pshare_jax.core.connector import TransferError
from pshare_jax.kernels.kv_codec.codebook import Codebook
from pshare_jax.kv.coded_way import CodedWay
from pshare_jax.kv.coding import CodingError, Wanted
from pshare_jax.kv.direct import DirectOffers
from pshare_jax.kv.links import Links
from pshare_jax.kv.peers import Claimed, Peers
from pshare_jax.kv.reading import Read
from pshare_jax.kv.records import Records
from pshare_jax.kv.traffic import Traffic
from pshare_jax.runtime.layout import PageLayout


class PagePuller:
    """Pulls the pieces of transfers for one worker. Thread-safe.

    Args:
        layout: of its pages.
        staging: where pieces lie on its mesh.
        peers: asks other processes.
        setting: `cluster.codec`.
        codecs: that can be decoded here.
        traffic: counts what has come.

    Attributes:
        records: how coded pages lie in arrays; None where they are not coded.
        coded: what is known of pages that come coded.
    """

    def __init__(
        self,
        layout: PageLayout,
        staging: Sharding,
        peers: Peers,
        setting: KvCodec,
        codecs: list[str],
        traffic: Traffic,
    ):
        self._layout = layout
        self._staging = staging
        self._peers = peers
        self._traffic = traffic
        self._shape = (layout.num_layers, *layout.layer_shape(1)[1:])
        self.records = records_of(layout, staging, setting) if codecs else None
        self._links = Links(setting, codecs if self.records is not None else [])
        self.coded = CodedWay(self._shape, self._links, traffic)

    def pull(self, direct: DirectOffers, transfer: int, url: str, count: int) -> Read:
        """Claims `count` pages from the process at `url`, and pulls them onto the mesh.

        Raises:
            TransferError: they are not there, or not what was asked for.
        """
        try:
            return self._pull(direct, transfer, url, count)
        except CodingError as error:
            self.coded.refuse(url, error.reason)
            raise

    def settle(self, url: str, transfer: int) -> None:
        """Says that a transfer has come."""
        self._peers.settle(url, transfer)

    def _pull(self, direct: DirectOffers, transfer: int, url: str, count: int) -> Read:
        raw = count * self._layout.bytes_per_page
        wanted = self._links.wanted(url, count, raw // max(count, 1), piped=False)
        started = time.perf_counter()
        claimed = self._peers.claim_pages(url, transfer, wanted)
        if claimed.pages != count:
            raise TransferError(
                f"transfer {transfer}: {claimed.pages} pages are on offer for {count} keys and "
                f"{count} places"
            )
        self._links.heard(url, claimed.coding)
        book, specs = self._expected(transfer, url, claimed, wanted)
        try:
            found = direct.pull(claimed, specs)
        except TransferError as error:
            raise TransferError(f"transfer {transfer}: {error}") from error
        between, wire = time.perf_counter(), sum(array.nbytes for array in found)
        if book is not None:
            found = self._decoded(transfer, claimed, book, found)
        ended, coded = time.perf_counter(), book is not None
        self._links.measured(url, raw, ended - started, coded=coded, decoding=ended - between)
        self._traffic.came("jax-transfer", book.codec if book else "raw", raw, wire)
        return Read(found, url if coded else "")

    def _expected(
        self, transfer: int, url: str, claimed: Claimed, wanted: Wanted | None
    ) -> tuple[Codebook | None, list[jax.ShapeDtypeStruct]]:
        """The codebook of what was claimed, None if it is not coded, and what it comes as."""
        coding, where = claimed.coding, f"transfer {transfer}"
        buckets = [bucket for _, bucket in pieces(claimed.pages, TRANSFER_BUCKETS)]
        plain = [
            jax.ShapeDtypeStruct(
                (self._shape[0], bucket, *self._shape[1:]),
                self._layout.dtype,
                sharding=self._staging,
            )
            for bucket in buckets
        ]
        if coding is None or not coding.coded:
            return None, plain
        book = self.coded.codebook(transfer, url, coding, wanted, lambda _: claimed.table)
        assert self.records is not None, "nothing is asked for coded that cannot be decoded"
        counts = [length for length, _ in pieces(claimed.pages, TRANSFER_BUCKETS)]
        fits = len(claimed.lengths) == len(counts) and all(
            len(lengths) in (0, count)
            for lengths, count in zip(claimed.lengths, counts, strict=True)
        )
        if not fits:
            raise CodingError("record", f"{where}: {claimed.lengths} are not its records")
        specs = [
            self.records.spec(coding.codec, bucket) if lengths else spec
            for lengths, bucket, spec in zip(claimed.lengths, buckets, plain, strict=True)
        ]
        return book, specs

    def _decoded(
        self, transfer: int, claimed: Claimed, book: Codebook, found: Sequence[jax.Array]
    ) -> list[jax.Array]:
        assert self.records is not None
        try:
            return [
                self.records.decode(book, rows, lengths) if lengths else rows
                for rows, lengths in zip(found, claimed.lengths, strict=True)
            ]
        except ValueError as error:
            raise CodingError("record", f"transfer {transfer}: {error}") from None


def records_of(layout: PageLayout, staging: Sharding, setting: KvCodec) -> Records | None:
    """How pages are coded for being pulled; None where they are not.

    On CPUs that is done in the host's memory. On accelerators it is done by the device, if a codec
    is asked for by name: what that takes there has not been measured.
    """
    shape = (layout.num_layers, *layout.layer_shape(1)[1:])
    devices = list(staging.device_set)
    if len(devices) > 1:
        return None
    if devices[0].platform == "cpu":
        return Records(shape, staging)
    return Records(shape, staging, setting) if setting in ("planes", "top16") else None
