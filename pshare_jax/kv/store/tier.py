"""One tier of the store: a pool, the codec of its pages, and counters of what went in and out."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pshare_jax.kernels.kv_codec.api import PageCodec, page_codec
from pshare_jax.kv.store.pool import Buffer, Pin, Pool, Reservation


@dataclass
class TierCounters:
    """What a tier has done since it was opened, in pages, bytes and seconds.

    `missed` are pages that were looked up in vain or were not what was asked for, by reason:
    `missing`, `checksum`, `tokens`, `codec`, `truncated`, `generation`, `io`, `record`. `refused`
    are pages that were not written: `exists`, `full` (all slots in use), `large` (it does not
    compress), `io`, `lost`. Raw bytes are those of the pages as they are in a device's pool.
    """

    hits: int = 0
    stored: int = 0
    missed: Counter[str] = field(default_factory=Counter[str])
    refused: Counter[str] = field(default_factory=Counter[str])
    bytes_read: int = 0
    bytes_written: int = 0
    raw_bytes_written: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def miss(self, why: str, count: int = 1) -> None:
        """Counts pages that were not had; from any thread."""
        with self._lock:
            self.missed[why] += count

    def hit(self, num_bytes: int) -> None:
        """Counts a page that was read; from any thread."""
        with self._lock:
            self.hits += 1
            self.bytes_read += num_bytes

    def add_read_seconds(self, seconds: float) -> None:
        """Counts time spent in reading; from any thread."""
        with self._lock:
            self.read_seconds += seconds


class Tier:
    """Reads and writes pages of one pool. Each calling thread has a buffer of its own.

    Args:
        name: `shared` or `disk`.
        pool: the records.
    """

    def __init__(self, name: str, pool: Pool):
        self.name = name
        self.pool = pool
        self.codec: PageCodec = page_codec(pool.book)
        self.counters = TierCounters()
        self._head = 4 * pool.spec.page_size

    def get(
        self,
        keys: Sequence[bytes],
        tokens: Sequence[Sequence[int]],
        staged: np.ndarray,
        indices: Sequence[int],
        buffer: Buffer,
    ) -> tuple[list[str | None], list[bytes]]:
        """Reads pages into places of a staging array.

        Args:
            keys: of the pages.
            tokens: that each of them must hold.
            staged: `[L, n, 2, kv_heads, page_size, head_dim]`, C-contiguous.
            indices: where in it each page goes.
            buffer: of the calling thread.

        Returns:
            For each page what was wrong, or None; and the keys of those read for the first time.
        """
        pins = self.pool.pin(keys)
        held = [pin for pin in pins if pin is not None]
        reasons: list[str | None] = []
        try:
            for pin, wanted, index in zip(pins, tokens, indices, strict=True):
                reasons.append(self._read(pin, wanted, staged, index, buffer))
        except BaseException:
            self.pool.unpin(held)
            raise
        wrong = [pin for pin, why in zip(pins, reasons, strict=True) if pin and why]
        still = dict(zip(held, self.pool.unpin(held, wrong), strict=True))
        for i, pin in enumerate(pins):
            if pin is not None and reasons[i] is None and not still[pin]:
                reasons[i] = "generation"
        self._count(pins, reasons)
        return reasons, [pin.key for pin in held if pin.uses == 0]

    def put(
        self, key: bytes, tokens: Sequence[int], staged: np.ndarray, index: int, buffer: Buffer
    ) -> str | None:
        """Writes one page of a staging array, as `get` takes it; why not, or None."""
        reservation = self.pool.reserve(key)
        if reservation is None:
            why = "exists" if self.pool.holds([key])[0] else "full"
            self.counters.refused[why] += 1
            return why
        if len(tokens) < self.pool.spec.page_size:
            staged, index = _only(staged, index, len(tokens)), 0
        try:
            length = self.codec.encode(staged, index, buffer.bytes[self._head :])
            if length is None:
                return self._refuse(reservation, "large")
            head = buffer.bytes[: self._head].view(np.int32)
            head[: len(tokens)] = tokens
            head[len(tokens) :] = -1
            self.pool.write(reservation, buffer, self._head + length)
        except OSError:
            return self._refuse(reservation, "io")
        except BaseException:
            self.pool.cancel(reservation)
            raise
        record = buffer.bytes[: self._head + length]
        if not self.pool.publish(reservation, record, len(tokens)):
            return self._refuse(reservation, "lost")
        self._wrote(len(record), staged[:, index].nbytes)
        return None

    def peek(self, key: bytes, staged: np.ndarray, buffer: Buffer) -> tuple[int, ...] | None:
        """Reads a page into the first place of a staging array; its tokens, or None if it is not
        there. Nobody has asked for it: nothing is counted."""
        (pin,) = self.pool.pin([key])
        if pin is None:
            return None
        tokens: tuple[int, ...] = ()
        try:
            record = self.pool.read(pin, buffer)
            tokens = tuple(record[: self._head].view(np.int32)[: pin.num_tokens].tolist())
            wrong = self.pool.verify(pin, record, tokens)
            if wrong is None:
                self.codec.decode(record[self._head :], staged, 0)
        except (OSError, ValueError):
            wrong = "record"
        (still,) = self.pool.unpin([pin], [pin] if wrong else [])
        return tokens if still and wrong is None else None

    def close(self) -> None:
        """Leaves the pool."""
        self.pool.close()

    def _read(
        self,
        pin: Pin | None,
        tokens: Sequence[int],
        staged: np.ndarray,
        index: int,
        buffer: Buffer,
    ) -> str | None:
        if pin is None:
            return "missing"
        try:
            record = self.pool.read(pin, buffer)
            wrong = self.pool.verify(pin, record, tokens)
            if wrong is None:
                self.codec.decode(record[self._head :], staged, index)
            return wrong
        except OSError:
            return "io"
        except ValueError:
            return "record"

    def _count(self, pins: Sequence[Pin | None], reasons: Sequence[str | None]) -> None:
        for pin, why in zip(pins, reasons, strict=True):
            if why is not None:
                self.counters.miss(why)
            elif pin is not None:
                self.counters.hit(pin.length)

    def _refuse(self, reservation: Reservation, why: str) -> str:
        self.pool.cancel(reservation)
        self.counters.refused[why] += 1
        return why

    def _wrote(self, num_bytes: int, raw_bytes: int) -> None:
        self.counters.stored += 1
        self.counters.bytes_written += num_bytes
        self.counters.raw_bytes_written += raw_bytes


def _only(staged: np.ndarray, index: int, num_tokens: int) -> np.ndarray:
    """A page alone, whose slots behind its tokens repeat the last one.

    What lies there is of no use, may be another's, and does not compress.
    """
    page = staged[:, index : index + 1].copy()
    page[..., num_tokens:, :] = page[..., num_tokens - 1 : num_tokens, :]
    return page
