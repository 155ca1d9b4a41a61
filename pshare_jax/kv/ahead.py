"""Pages that are read as soon as it is heard that they are on offer.

The engine takes messages in between two pieces of work, and a step may take longer than reading
does. So what is on offer is read beside it, from when the message comes; when the engine comes to
accept the transfer, the pages may be there.

Whoever reads has taken the offer: nobody can read it again. So a transfer that may still be
accepted is never forgotten for another one, which is left where it is and read when it is accepted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import jax

from pshare_jax.kv.offers import LEASE_SECONDS
from pshare_jax.kv.reading import Read

MAX_BYTES = 256 * 2**20
"""Of pages that are read before their transfers are accepted, padding and copies included; others
are read then."""


@dataclass
class Found:
    """What was read of a transfer: `read`, and where it was put on the mesh at once, the pieces
    there, of which `read` has no copy any more, and the checksums of their pages."""

    read: Read
    staged: list[jax.Array] = field(default_factory=list)
    checksums: list[jax.Array] | None = None


@dataclass(frozen=True)
class _Begun:
    address: str
    num_bytes: int
    until: float
    reading: Future[Found]

    @property
    def held(self) -> int:
        """Bytes that it may take now: as it is read, and put on the mesh."""
        return self.num_bytes if self.reading.done() else 2 * self.num_bytes


class ReadAhead:
    """Transfers that are being read, or were, and are not accepted. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: dict[int, _Begun] = {}

    def __len__(self) -> int:
        return len(self._begun)

    def begin(
        self,
        transfer: int,
        address: str,
        num_bytes: int,
        now: float,
        read: Callable[[], Future[Found]],
    ) -> bool:
        """Has a transfer read, if there is room for it.

        Args:
            transfer: its id.
            address: where it is on offer.
            num_bytes: that it takes when it is there, padding included; twice that until then.
            now: seconds, from any start.
            read: begins to read it, which takes the offer; called at most once.

        Returns:
            Whether it is being read; otherwise nothing was done.

        Raises:
            whatever `read` raises.
        """
        with self._lock:
            # As long as an offer stands that nobody takes; who wanted it has given it up long ago.
            for number, begun in tuple(self._begun.items()):
                if now >= begun.until:
                    self._drop(number)
            held = sum(begun.held for begun in self._begun.values())
            if transfer in self._begun or held + 2 * num_bytes > MAX_BYTES:
                return False
            self._begun[transfer] = _Begun(address, num_bytes, now + LEASE_SECONDS, read())
            return True

    def take(self, transfer: int, address: str, num_bytes: int) -> Future[Found] | None:
        """What is being read of a transfer, if that is so many bytes from that address; it is not
        known here any more."""
        with self._lock:
            begun = self._begun.pop(transfer, None)
        same = begun is not None and (begun.address, begun.num_bytes) == (address, num_bytes)
        return begun.reading if begun is not None and same else None

    def drop(self, transfer: int) -> None:
        """Forgets a transfer, if it is known; it is not read if that has not begun."""
        with self._lock:
            self._drop(transfer)

    def _drop(self, transfer: int) -> None:
        begun = self._begun.pop(transfer, None)
        if begun is not None:
            begun.reading.cancel()
