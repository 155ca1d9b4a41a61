"""The books of a pool: which slot holds which record, who reads it, and which one goes next.

The headers are the truth. What is derived from them (table, pins, totals) is built anew when the
word `dirty` says that its last writer died before he was done. All of it lies in shared memory, and
every method of `Books` is for the holder of the pool's lock.
"""

from __future__ import annotations

import mmap
import struct

import numpy as np

from pshare_jax.kv.store.file import (
    FREE,
    HEADER,
    READY,
    WRITING,
    PoolFile,
    Regions,
    words_at,
)
from pshare_jax.kv.store.members import MAX_MEMBERS

_DIRTY, _CLOCK, _BURIED, _REBUILT = range(4)
_NEVER = np.iinfo(np.int64).max
_KEY = struct.Struct("<QQ")


class BooksError(Exception):
    """The table holds what no user of the pool has written. It is built anew by who comes next."""


class Books:
    """Headers, table and pins of an open pool file.

    Methods raise `BooksError`, and end, whatever the table holds.

    Args:
        file: the pool's, which this process has joined.
    """

    def __init__(self, file: PoolFile):
        regions = Regions(file.spec)
        self.slots = file.spec.slots
        self._members = file.members
        self._map = mmap.mmap(file.headers, regions.records)
        memory = np.frombuffer(self._map, np.uint8)

        def region(name: str, dtype: np.dtype | type) -> np.ndarray:
            first, end = regions.at[name]
            return memory[first:end].view(dtype)

        first, end = words_at()
        self._words = memory[first:end].view(np.int64)
        self.headers = region("headers", HEADER)
        self._pins = region("pins", np.uint16).reshape(MAX_MEMBERS, self.slots)
        self._totals = region("totals", np.uint32)
        self._table = region("table", np.int32)
        self._mask = regions.table_size - 1
        # Views of the fields, which are looked at again and again.
        self.state, self.owner = self.headers["state"], self.headers["owner"]
        self.used, self.uses = self.headers["used"], self.headers["uses"]
        self.generation = self.headers["generation"]
        self._key0, self._key1 = self.headers["key0"], self.headers["key1"]

    @property
    def buried(self) -> int:
        """Members whose pins and half-written slots were taken from them, ever."""
        return int(self._words[_BURIED])

    @property
    def rebuilt(self) -> int:
        """How often the derived books were built anew."""
        return int(self._words[_REBUILT])

    def begin(self) -> None:
        """Called with the lock, before anything else."""
        if self._words[_DIRTY]:
            self._rebuild()
        self._words[_DIRTY] = 1

    def end(self) -> None:
        """Called before the lock is given up."""
        self._words[_DIRTY] = 0

    def find(self, key: bytes) -> int | None:
        """The slot of a key, in any state."""
        key0, key1 = _KEY.unpack(key)
        at = key0 & self._mask
        # Bounded, whatever the table holds.
        for _ in range(self._mask + 1):
            slot = int(self._table[at])
            if slot < 0:
                return None
            if slot < self.slots and self._key0[slot] == key0 and self._key1[slot] == key1:
                return slot
            at = (at + 1) & self._mask
        return None

    def key_of(self, slot: int) -> bytes:
        """The key of what a slot holds."""
        return _KEY.pack(int(self._key0[slot]), int(self._key1[slot]))

    def pin(self, slot: int) -> None:
        """Notes that this member reads a slot, which is not given away meanwhile; it is a use."""
        self._pins[self._members.me, slot] += 1
        self._totals[slot] += 1
        self.touch(slot)

    def unpin(self, slot: int) -> None:
        """This member reads a slot no more."""
        if self._pins[self._members.me, slot]:
            self._pins[self._members.me, slot] -= 1
            self._totals[slot] -= 1

    def pinned(self, slot: int) -> bool:
        """Whether anybody reads a slot."""
        return bool(self._totals[slot])

    def touch(self, slot: int) -> None:
        """A use of a slot's record."""
        self._words[_CLOCK] += 1
        self.used[slot] = self._words[_CLOCK]
        self.uses[slot] += 1

    def take(self, key: bytes) -> int | None:
        """A slot that this member writes a record of `key` to; None if none is to be had.

        It is a free one, or that of the record whose last use is longest ago and that nobody reads.
        """
        slot = self._vacant()
        if slot is None and self.bury_dead():
            slot = self._vacant()
        if slot is None:
            return None
        if self.state[slot] != FREE:
            self.drop(slot)
        self.owner[slot] = self._members.me
        self.generation[slot] += 1
        self._key0[slot], self._key1[slot] = _KEY.unpack(key)
        self.uses[slot] = 0
        # Last, so that a slot of this state has all the rest.
        self.state[slot] = WRITING
        try:
            self._insert(slot)
        except BooksError:
            # Its writer lives, and would never hear of it.
            self.state[slot] = FREE
            raise
        return slot

    def drop(self, slot: int) -> None:
        """Frees a slot."""
        at = self._place(slot)
        self.state[slot] = FREE
        if at is None:
            return
        # Moves up those that were displaced past it.
        self._table[at] = -1
        after = (at + 1) & self._mask
        while (other := int(self._table[after])) >= 0:
            if other >= self.slots:
                raise BooksError(f"the table lists slot {other} of {self.slots}")
            home = int(self._key0[other]) & self._mask
            if (after - home) & self._mask >= (after - at) & self._mask:
                self._table[at], self._table[after] = other, -1
                at = after
            after = (after + 1) & self._mask

    def bury_dead(self) -> int:
        """Takes from dead members what they held; how many there were."""
        holders = set(np.flatnonzero(self._pins.any(axis=1)).tolist())
        holders |= set(self.owner[self.state == WRITING].tolist())
        dead = [member for member in holders if not self._members.alive(member)]
        for member in dead:
            self.bury(member)
        self._words[_BURIED] += len(dead)
        return len(dead)

    def bury(self, member: int) -> None:
        """Drops the pins of a member, and the slots that it was writing."""
        if member < MAX_MEMBERS:
            self._totals -= self._pins[member]
            self._pins[member] = 0
        for slot in np.flatnonzero((self.state == WRITING) & (self.owner == member)):
            self.drop(int(slot))

    def writer_lives(self, slot: int) -> bool:
        """Whether the member that writes a slot lives."""
        return self._members.alive(int(self.owner[slot]))

    def counts(self) -> dict[str, int]:
        """Slots by state, and how many are pinned."""
        states = np.bincount(self.state, minlength=3)
        return {
            "free": int(states[FREE]),
            "writing": int(states[WRITING]),
            "ready": int(states[READY]),
            "pinned": int(np.count_nonzero(self._totals)),
        }

    def check(self) -> None:
        """Asserts that what is derived is what the headers say."""
        assert np.array_equal(self._totals, self._pins.sum(axis=0)), "totals are not sums of pins"
        listed = sorted(self._table[self._table >= 0].tolist())
        assert listed == np.flatnonzero(self.state != FREE).tolist(), "the table lists other slots"
        for slot in listed:
            assert self.find(self.key_of(slot)) == slot, f"slot {slot} is not found by its key"

    def close(self) -> None:
        """Lets the memory go; nothing may be called any more."""
        for name in [n for n, value in vars(self).items() if isinstance(value, np.ndarray)]:
            delattr(self, name)
        self._map.close()

    def _vacant(self) -> int | None:
        free = np.flatnonzero(self.state == FREE)
        if len(free):
            return int(free[0])
        idle = (self.state == READY) & (self._totals == 0)
        return int(np.where(idle, self.used, _NEVER).argmin()) if idle.any() else None

    def _insert(self, slot: int) -> None:
        at = int(self._key0[slot]) & self._mask
        for _ in range(self._mask + 1):
            if self._table[at] < 0:
                self._table[at] = slot
                return
            at = (at + 1) & self._mask
        raise BooksError("the table is full, though it has room for more than all slots")

    def _place(self, slot: int) -> int | None:
        """Where the table lists a slot."""
        at = int(self._key0[slot]) & self._mask
        for _ in range(self._mask + 1):
            if self._table[at] == slot:
                return at
            if self._table[at] < 0:
                return None
            at = (at + 1) & self._mask
        return None

    def _rebuild(self) -> None:
        """Builds the derived books from the headers and from who lives."""
        self._words[_REBUILT] += 1
        self.state[self.state > READY] = FREE
        for member in np.flatnonzero(self._pins.any(axis=1)):
            if not self._members.alive(int(member)):
                self._pins[member] = 0
        self._totals[:] = self._pins.sum(axis=0)
        self._table[:] = -1
        # Of two slots with one key a record that is there is kept.
        for state in (READY, WRITING):
            for slot in np.flatnonzero(self.state == state):
                if self.find(self.key_of(int(slot))) is None:
                    self._insert(int(slot))
                else:
                    self.state[slot] = FREE
