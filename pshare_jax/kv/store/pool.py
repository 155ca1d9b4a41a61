"""A pool of records in one file, which any number of processes read and write at once.

A record is written by `reserve`, `write` and `publish`: until the last one it is not found. It is
read by `pin`, `read`, `verify` and `unpin`: while it is pinned its slot is not given away, and what
was read counts only if generation, checksum and tokens are right. A process may be killed between
any two instructions: its lock goes with it, the books are built anew where it left them half done,
and its pins and half-written slots are taken back as soon as slots are short.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash

from pshare_jax.errors import ConfigError
from pshare_jax.kv.store import locking
from pshare_jax.kv.store.books import Books, BooksError
from pshare_jax.kv.store.file import (
    BLOCK,
    READY,
    WRITING,
    PoolDamagedError,
    PoolFile,
    PoolRequest,
    Regions,
    codec_number,
    open_file,
)

T = TypeVar("T")

_SEED = struct.Struct("<16sQIIB")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Pin:
    """A record that is being read, as its header was when it was pinned."""

    slot: int
    key: bytes
    generation: int
    length: int
    num_tokens: int
    codec: int
    checksum: int
    uses: int

    @property
    def seed(self) -> int:
        """What the checksum is seeded with, so that a torn header is noticed."""
        return _seed(self.key, self.generation, self.length, self.num_tokens, self.codec)


@dataclass(frozen=True)
class Reservation:
    """A slot that is being written."""

    slot: int
    key: bytes
    generation: int


class Buffer:
    """Memory for one record, aligned for direct I/O. One thread uses it at a time."""

    def __init__(self, slot_bytes: int):
        self._map = mmap.mmap(-1, slot_bytes)
        self.bytes = np.frombuffer(self._map, np.uint8)


class Pool:
    """A pool that this process has joined. Methods may be called from any thread.

    All of them raise `PoolBusyError`, if the lock is not to be had or the books are not what they
    should be, and `PoolDamagedError`, if the file is not as long as it was.
    """

    def __init__(self, file: PoolFile):
        self.spec, self.book, self.warm = file.spec, file.book, file.warm
        self.codec = codec_number(file.spec.codec)
        self._file = file
        self._regions = Regions(file.spec)
        self._members = file.members
        self._thread_lock = threading.Lock()
        self._books = Books(file)
        self._identity = _identity(file.records)
        self._owed: list[Callable[[Books], object]] = []

    @classmethod
    def open(cls, path: str, request: PoolRequest) -> Pool:
        """Opens the pool at `path`, with what is in it if it fits.

        Raises:
            ConfigError: it cannot be made or used, or has too many users.
        """
        pool = cls(open_file(path, request))
        try:
            with pool._locked() as books:
                # Whoever had this number before.
                books.bury(pool._members.me)
                books.bury_dead()
        except (locking.PoolBusyError, PoolDamagedError) as error:
            pool.close()
            raise ConfigError(f"kv_store: {path}: {error}") from error
        return pool

    @property
    def identity(self) -> str:
        """Of the file, among those of all hosts."""
        return self._identity

    def buffer(self) -> Buffer:
        """Memory for one record."""
        return Buffer(self.spec.slot_bytes)

    def holds(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether there is a record of each key."""
        with self._locked() as books:
            found = [books.find(key) for key in keys]
            return [slot is not None and books.state[slot] == READY for slot in found]

    def touch(self, keys: Sequence[bytes]) -> list[int]:
        """Uses records; how often each has been used before, or -1 where there is none."""
        uses: list[int] = []
        with self._locked() as books:
            for key in keys:
                slot = books.find(key)
                if slot is None or books.state[slot] != READY:
                    uses.append(-1)
                else:
                    uses.append(int(books.uses[slot]))
                    books.touch(slot)
        return uses

    def pin(self, keys: Sequence[bytes]) -> list[Pin | None]:
        """Keeps records in their slots until `unpin`; None where there is none."""
        with self._locked() as books:
            return [self._pin(books, key) for key in keys]

    def _pin(self, books: Books, key: bytes) -> Pin | None:
        slot = books.find(key)
        if slot is None or books.state[slot] != READY:
            return None
        header = books.headers[slot]
        length = int(header["length"])
        if not 4 * self.spec.page_size <= length <= self.spec.slot_bytes:
            if not books.pinned(slot):
                books.drop(slot)
            return None
        pin = Pin(
            slot,
            key,
            int(header["generation"]),
            length,
            int(header["num_tokens"]),
            int(header["codec"]),
            int(header["checksum"]),
            int(header["uses"]),
        )
        books.pin(slot)
        return pin

    def read(self, pin: Pin, buffer: Buffer) -> np.ndarray:
        """Copies a pinned record to a buffer; what there is of it.

        Raises:
            OSError: the medium does not give it.
        """
        wanted = -(-pin.length // BLOCK) * BLOCK
        memory = buffer.bytes[:wanted].data
        got = os.preadv(self._file.records, [memory], self._offset(pin.slot))
        return buffer.bytes[: min(got, pin.length)]

    def verify(self, pin: Pin, record: np.ndarray, tokens: Sequence[int]) -> str | None:
        """What is wrong with a record that was read, if anything is: it must not be used then."""
        if len(record) != pin.length:
            return "truncated"
        if pin.codec != self.codec:
            return "codec"
        if xxhash.xxh3_64_intdigest(record.data, seed=pin.seed) != pin.checksum:
            return "checksum"
        if pin.num_tokens != len(tokens) or not np.array_equal(
            record[: 4 * len(tokens)].view(np.int32), tokens
        ):
            return "tokens"
        return None

    def unpin(self, pins: Sequence[Pin], wrong: Sequence[Pin] = ()) -> list[bool]:
        """Ends the reading of records, and drops those that were `wrong`.

        Returns:
            For each pin whether its slot was the record's all the time.
        """

        def act(books: Books) -> list[bool]:
            still: list[bool] = []
            for pin in pins:
                same = books.generation[pin.slot] == pin.generation
                still.append(bool(same and books.state[pin.slot] == READY))
                books.unpin(pin.slot)
            for pin in wrong:
                same = books.generation[pin.slot] == pin.generation
                if same and books.state[pin.slot] == READY and not books.pinned(pin.slot):
                    books.drop(pin.slot)
            return still

        return self._now_or_later(act)

    def reserve(self, key: bytes) -> Reservation | None:
        """A slot for a record; None if there is one of that key, or if all slots are in use."""
        with self._locked() as books:
            slot = books.find(key)
            if slot is not None and books.state[slot] == WRITING and not books.writer_lives(slot):
                books.bury_dead()
                slot = books.find(key)
            if slot is not None:
                return None
            slot = books.take(key)
            if slot is None:
                return None
            return Reservation(slot, key, int(books.generation[slot]))

    def write(self, reservation: Reservation, buffer: Buffer, length: int) -> None:
        """Copies a record to its slot.

        Raises:
            OSError: the medium does not take it.
        """
        wanted = -(-length // BLOCK) * BLOCK
        memory = buffer.bytes[:wanted].data
        done = os.pwritev(self._file.records, [memory], self._offset(reservation.slot))
        if done != wanted:
            raise OSError(f"{self._file.path}: {done} of {wanted} bytes were written")

    def publish(self, reservation: Reservation, record: np.ndarray, num_tokens: int) -> bool:
        """Makes a record that was written readable; False if its slot is another's by now."""
        key, generation = reservation.key, reservation.generation
        seed = _seed(key, generation, len(record), num_tokens, self.codec)
        checksum = xxhash.xxh3_64_intdigest(record.data, seed=seed)

        def act(books: Books) -> bool:
            slot = reservation.slot
            if books.state[slot] != WRITING or books.generation[slot] != generation:
                return False
            header = books.headers[slot]
            header["length"], header["num_tokens"] = len(record), num_tokens
            header["codec"], header["checksum"] = self.codec, checksum
            books.touch(slot)
            books.uses[slot] = 0
            books.state[slot] = READY
            return True

        return self._now_or_later(act)

    def cancel(self, reservation: Reservation) -> None:
        """Gives a slot back that was not published."""

        def act(books: Books) -> None:
            slot = reservation.slot
            same = books.generation[slot] == reservation.generation
            if same and books.state[slot] == WRITING:
                books.drop(slot)

        self._now_or_later(act)

    def drop(self, keys: Sequence[bytes]) -> None:
        """Takes records out that nobody reads."""
        with self._locked() as books:
            for key in keys:
                slot = books.find(key)
                if slot is not None and books.state[slot] == READY and not books.pinned(slot):
                    books.drop(slot)

    def counts(self) -> dict[str, int]:
        """Slots by state (`free`, `writing`, `ready`), and how many are pinned."""
        with self._locked() as books:
            return books.counts()

    def recoveries(self) -> tuple[int, int]:
        """Dead members that were cleaned up after, and how often the books were built anew."""
        with self._locked() as books:
            return books.buried, books.rebuilt

    def check(self) -> None:
        """Asserts that the books are consistent."""
        with self._locked() as books:
            books.check()

    def bury_dead(self) -> int:
        """Takes back what dead members held; how many there were."""
        with self._locked() as books:
            return books.bury_dead()

    def close(self) -> None:
        """Leaves the pool; what this process held is given back."""
        with contextlib.suppress(PoolDamagedError, locking.PoolBusyError), self._locked() as books:
            books.bury(self._members.me)
        with self._thread_lock:
            self._books.close()
            self._file.close()

    def _offset(self, slot: int) -> int:
        return self._regions.records + slot * self.spec.slot_bytes

    def _now_or_later(self, act: Callable[[Books], T]) -> T:
        """Ends something: if the books are not to be had now, when they are next.

        Else a slot would stay pinned, or half-written, for as long as this process lives.
        """
        try:
            with self._locked() as books:
                return act(books)
        except locking.PoolBusyError:
            self._owed.append(act)
            raise

    @contextlib.contextmanager
    def _locked(self) -> Generator[Books, None, None]:
        with self._thread_lock:
            locking.lock(self._file.lock)
            try:
                # Headers that are not there any more would end the process.
                size = os.fstat(self._file.headers).st_size
                if size != self._regions.size:
                    raise PoolDamagedError(
                        f"{self._file.path} has {size} bytes, not {self._regions.size}"
                    )
                self._books.begin()
                while self._owed:
                    self._owed[-1](self._books)
                    self._owed.pop()
                yield self._books
                self._books.end()
            except BooksError as error:
                # They are marked as dirty still.
                raise locking.PoolBusyError(f"{self._file.path}: {error}") from error
            finally:
                locking.unlock(self._file.lock)


def _identity(descriptor: int) -> str:
    """Of a file, among those of all hosts."""
    there = os.fstat(descriptor)
    return f"{_BOOT.read_text().strip()}:{there.st_dev}:{there.st_ino}"


def _seed(key: bytes, generation: int, length: int, num_tokens: int, codec: int) -> int:
    return xxhash.xxh3_64_intdigest(_SEED.pack(key, generation, length, num_tokens, codec))
