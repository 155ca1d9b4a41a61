"""Pages from device to device by `jax.experimental.transfer`, without files in between.

The transfer server of a process knows no secret, and an array that is given to it stays there until
somebody pulls it, and cannot be taken back. So what is on offer is kept here, and given to the
server when a reader who has the cluster's secret claims it: under a random number that nobody else
is told. Readers say when they have it. What was claimed by one who has died may be lost memory;
when that is too much nothing is offered so any more. A pull that does not come to its end raises no
error by itself; it has a deadline here.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import transfer

from pshare_jax.core.buckets import TRANSFER_BUCKETS
from pshare_jax.core.buckets import pieces as cut
from pshare_jax.core.connector import TransferError
from pshare_jax.kv.coding import Coding, PageCoder, Wanted
from pshare_jax.kv.offers import LEASE_SECONDS
from pshare_jax.kv.peers import Claimed
from pshare_jax.kv.records import Records

logger = logging.getLogger(__name__)

PULL_SECONDS = 4.0
"""After this a pull counts as failed; others may still come in time for who asked for the pages."""

CLAIM_SECONDS = 60.0
"""After this what was claimed, and not said to have come, counts as lost."""

MAX_LOST_BYTES = 2**30
"""What may be lost in the transfer server before it is not used any more."""

_LOOK_SECONDS = 0.0005
"""Between two looks at whether it has come."""


@dataclass(frozen=True)
class _Offer:
    worker: str
    pieces: Sequence[jax.Array]
    pages: int
    until: float


class DirectOffers:
    """What one process has on offer by `jax.experimental.transfer`. Thread-safe.

    Args:
        host: address that the transfer server listens on.
        lease_seconds: how long an offer stands.
        clock: seconds, from any start.

    Raises:
        TransferError: there is no transfer server for these devices.
    """

    def __init__(
        self,
        host: str,
        lease_seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._coder: PageCoder | None = None
        self._records: Records | None = None
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._offers: OrderedDict[int, _Offer] = OrderedDict()
        self._claimed: OrderedDict[int, tuple[int, float]] = OrderedDict()
        self._lost = 0
        self._connections: dict[str, Any] = {}
        address = f"[{host}]:0" if ":" in host else f"{host}:0"
        try:
            client = jax.devices()[0].client
            self._server = transfer.start_transfer_server(client, address, [address])
        except (RuntimeError, AttributeError) as error:
            raise TransferError(f"jax.experimental.transfer: {error}") from error

    def __len__(self) -> int:
        """Transfers on offer."""
        with self._lock:
            return len(self._offers)

    @property
    def usable(self) -> bool:
        """Whether not too much has been lost."""
        with self._lock:
            self._expire()
            return self._lost <= MAX_LOST_BYTES

    def code_by(self, coder: PageCoder, records: Records | None) -> None:
        """Codes pages for those who want that.

        Args:
            coder: by what.
            records: how that lies in arrays; None codes nothing.
        """
        self._coder, self._records = coder, records

    def put(self, number: int, worker: str, pieces: Sequence[jax.Array], pages: int) -> None:
        """Offers the pieces of a transfer, which have so many pages beside padding.

        Raises:
            TransferError: there is an offer of that id.
        """
        with self._lock:
            self._expire()
            if number in self._offers:
                raise TransferError(f"transfer {number} is on offer already")
            until = self._clock() + self._lease_seconds
            self._offers[number] = _Offer(worker, pieces, pages, until)

    def drop(self, number: int) -> None:
        """Withdraws an offer; unknown ones and those that were claimed are ignored."""
        with self._lock:
            self._offers.pop(number, None)

    def drop_worker(self, worker: str) -> None:
        """Withdraws all offers of a worker that has failed."""
        with self._lock:
            for number in [t for t, offer in self._offers.items() if offer.worker == worker]:
                del self._offers[number]

    def claim(self, number: int, wanted: Wanted | None = None) -> Claimed:
        """Has an offer pulled by who calls this; nobody can claim it any more.

        Args:
            number: of the transfer.
            wanted: how its pages had better come.

        Raises:
            TransferError: there is none.
        """
        with self._lock:
            self._expire()
            offer = self._offers.pop(number, None)
        if offer is None:
            raise TransferError(f"transfer {number}: nothing is on offer")
        arrays, coding, lengths = self._coded(offer, wanted)
        size = sum(array.nbytes for array in arrays)
        with self._lock:
            self._claimed[number] = size, self._clock() + CLAIM_SECONDS
        key = secrets.randbits(63)
        if arrays:
            self._server.await_pull(key, arrays)
        table = b""
        if coding is not None and coding.table and self._coder is not None:
            assert self._coder.codec is not None
            assert self._coder.codec.book is not None
            table = self._coder.codec.book.table.tobytes()
        return Claimed(self._server.address(), key, offer.pages, coding, table, lengths)

    def _coded(
        self, offer: _Offer, wanted: Wanted | None
    ) -> tuple[list[jax.Array], Coding | None, list[list[int]]]:
        """What is given to the transfer server, and what `Claimed` says of it."""
        arrays = list(offer.pieces)
        coder, records = self._coder, self._records
        if coder is None or records is None:
            return arrays, None, []
        counts = [length for length, _ in cut(offer.pages, TRANSFER_BUCKETS)]
        if wanted is not None and coder.learns:
            for piece, count in zip(arrays, counts, strict=True):
                coder.learn(np.asarray(piece), count)
        coding = coder.answer(wanted)
        if coding is None or not coding.coded or coder.codec is None:
            return arrays, coding, []
        lengths: list[list[int]] = []
        for place, (piece, count) in enumerate(zip(arrays, counts, strict=True)):
            found = records.encode(coder.codec, piece, count)
            lengths.append([] if found is None else found[1])
            arrays[place] = piece if found is None else found[0]
        return arrays, coding, lengths

    def settle(self, number: int) -> None:
        """Who has claimed an offer has it."""
        with self._lock:
            self._claimed.pop(number, None)

    def pull(self, claimed: Claimed, pieces: Sequence[jax.ShapeDtypeStruct]) -> list[jax.Array]:
        """Pulls what was claimed; polls, since what will never come says nothing.

        Raises:
            TransferError: it did not come, or not in time.
        """
        address = claimed.server
        connection = self._connections.get(address)
        try:
            if connection is None:
                # Not with the lock: it may take as long as the network lets it.
                connection = self._connections[address] = self._server.connect(address)
            return self._wait(connection.pull(claimed.key, list(pieces)))
        except (TransferError, RuntimeError, ValueError) as error:
            # The next pull has a connection of its own.
            self._connections.pop(address, None)
            raise TransferError(str(error)) from error

    def _wait(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        deadline = self._clock() + PULL_SECONDS
        while not all(array.is_ready() for array in arrays):  # pyright: ignore[reportAttributeAccessIssue]
            if self._clock() >= deadline:
                with self._lock:
                    # They stay until the other process ends.
                    self._lost += sum(array.nbytes for array in arrays)
                raise TransferError(f"it has not come within {PULL_SECONDS:g} s")
            time.sleep(_LOOK_SECONDS)
        return list(jax.block_until_ready(arrays))

    def expire(self) -> None:
        """Forgets offers and claims whose time is over."""
        with self._lock:
            self._expire()

    def _expire(self) -> None:
        now = self._clock()
        for number in [t for t, offer in self._offers.items() if offer.until <= now]:
            del self._offers[number]
        for number, (size, until) in tuple(self._claimed.items()):
            if until > now:
                break
            del self._claimed[number]
            if self._lost <= MAX_LOST_BYTES < self._lost + size:
                logger.warning(
                    "jax.experimental.transfer: readers have died with %d bytes that cannot be "
                    "taken back; pages go by file and HTTP until this process is started again",
                    self._lost + size,
                )
            self._lost += size
