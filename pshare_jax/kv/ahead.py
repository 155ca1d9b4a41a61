"""Pages that are read as soon as it is heard that they are on offer.

The engine takes messages in between two pieces of work, and a step may take longer than reading
does. So what is on offer is read beside it, from when the message comes; when the engine comes to
accept the transfer, the pages may be there.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field

import jax

from pshare_jax.kv.reading import Read

MAX_BYTES = 256 * 2**20
"""Of pages that are read before their transfers are accepted; others are read then."""


@dataclass
class Found:
    """What was read of a transfer: `read`, and where it was put on the mesh at once, the pieces
    there and the checksums of their pages."""

    read: Read
    staged: list[jax.Array] = field(default_factory=list)
    checksums: list[jax.Array] | None = None


@dataclass(frozen=True)
class _Begun:
    address: str
    num_bytes: int
    reading: Future[Found]


class ReadAhead:
    """Transfers that are being read, or were, and are not accepted. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: OrderedDict[int, _Begun] = OrderedDict()

    def __len__(self) -> int:
        return len(self._begun)

    def has_room(self, num_bytes: int) -> bool:
        """Whether so much more may be read. What has waited longest is forgotten for it."""
        with self._lock:
            while self._begun and self._total() + num_bytes > MAX_BYTES:
                self._begun.popitem(last=False)
            return num_bytes <= MAX_BYTES

    def put(self, transfer: int, address: str, num_bytes: int, reading: Future[Found]) -> None:
        """A transfer is being read."""
        with self._lock:
            self._begun[transfer] = _Begun(address, num_bytes, reading)

    def take(self, transfer: int, address: str, num_bytes: int) -> Future[Found] | None:
        """What is being read of a transfer, if that is so many bytes from that address; it is not
        known here any more."""
        with self._lock:
            begun = self._begun.pop(transfer, None)
        same = begun is not None and (begun.address, begun.num_bytes) == (address, num_bytes)
        return begun.reading if begun is not None and same else None

    def drop(self, transfer: int) -> None:
        """Forgets a transfer, if it is known."""
        with self._lock:
            self._begun.pop(transfer, None)

    def _total(self) -> int:
        return sum(begun.num_bytes for begun in self._begun.values())
