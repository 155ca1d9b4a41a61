"""The store of one process: its tiers, and the threads that read and write them.

Nobody waits for these threads: answers come by a callback, in the thread that gives them. What goes
wrong with a tier is a miss, and is counted; a tier whose file is damaged is not used any more.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from pshare_jax.core.buckets import TRANSFER_BUCKETS, pieces
from pshare_jax.core.plans import Load
from pshare_jax.core.prices import DISK, NOWHERE, SHARED
from pshare_jax.core.stats import TierStats
from pshare_jax.kv.store.file import PoolDamagedError
from pshare_jax.kv.store.locking import PoolBusyError
from pshare_jax.kv.store.pool import Buffer
from pshare_jax.kv.store.tier import Tier

logger = logging.getLogger(__name__)

T = TypeVar("T")

PLACES = {"shared": SHARED, "disk": DISK}

_HELD_AT_ONCE = 64
"""Pages that are looked for in one go, while others wait."""
"""Where the pages of a tier are said to be."""


@dataclass(frozen=True)
class Batch:
    """Pages to be written: keys and tokens of the first pages of a staging array."""

    staged: object
    keys: list[bytes]
    tokens: list[tuple[int, ...]]


class _Thread:
    """Runs actions one after the other in a thread of its own."""

    def __init__(self, name: str):
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, action: Callable[[], None]) -> None:
        self._queue.put(action)

    def stop(self) -> None:
        """Ends the thread after what it was given so far, and waits for it."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (action := self._queue.get()) is not None:
            try:
                action()
            except Exception:
                logger.exception("the KV store has failed at something; it is left out")


@dataclass
class StoreService:
    """Finds, reads and writes pages for the workers of a process.

    Args:
        tiers: `shared`, then `disk` if there is one.
        shape: of a page, `[L, 2, kv_heads, page_size, head_dim]`.
        dtype: of its values.
        always: whether the disk takes every page rather than those that are used again.
    """

    tiers: list[Tier]
    shape: tuple[int, ...]
    dtype: np.dtype
    always: bool = False
    _closed: bool = False
    _damaged: set[str] = field(default_factory=set[str])

    def __post_init__(self) -> None:
        slot_bytes = max(tier.pool.spec.slot_bytes for tier in self.tiers)
        self._read_buffer, self._write_buffer = Buffer(slot_bytes), Buffer(slot_bytes)
        self._early_buffer = Buffer(slot_bytes)
        self._reader, self._writer = _Thread("kv-store-reader"), _Thread("kv-store-writer")
        # What nobody waits for yet is not in the way of what somebody does.
        self._early = _Thread("kv-store-ahead")

    def look(
        self, keys: Sequence[bytes], answer: Callable[[list[int]], None], *, ahead: bool = False
    ) -> None:
        """Answers where pages are, up to the first that is nowhere; nobody waits for it `ahead`."""

        def act() -> None:
            places: list[int] = []
            try:
                places = self._look(keys)
            finally:
                answer(places)

        (self._early if ahead else self._reader).post(act)

    def load(
        self,
        load: Load,
        keys: Sequence[bytes],
        wanted: Callable[[], bool],
        answer: Callable[[list[np.ndarray] | str], None],
    ) -> None:
        """Answers the pages of a load in staging arrays, or why they cannot be had.

        Args:
            load: what to fetch.
            keys: of its pages in the store.
            wanted: whether it still is, when its turn has come.
            answer: called with arrays of `TRANSFER_BUCKETS` pages, padded with zeros.
        """

        def act() -> None:
            result: list[np.ndarray] | str = "nobody wants it any more"
            try:
                if wanted():
                    result = self._load(load, keys)
            except Exception as error:
                result = f"{type(error).__name__}: {error}"
                raise
            finally:
                answer(result)

        (self._early if load.ahead else self._reader).post(act)

    def save(self, batches: Sequence[Batch], answer: Callable[[list[bytes]], None]) -> None:
        """Writes pages; answers those that are in the store."""

        def act() -> None:
            kept: list[bytes] = []
            try:
                for batch in batches:
                    kept += self._save(batch)
            finally:
                answer(kept)

        self._writer.post(act)

    def touch(self, keys: Sequence[bytes], answer: Callable[[list[int]], None]) -> None:
        """Notes that pages were used; answers the places in `keys` of those that are gone."""
        self._writer.post(lambda: answer(self._touch(keys)))

    def stats(self) -> dict[str, TierStats]:
        """What each tier has done."""
        return {tier.name: self._stats(tier) for tier in self.tiers}

    def held(self, keys: Sequence[bytes]) -> dict[str, list[bool]]:
        """Which pages each tier has, by its name; from any thread, and counted nowhere."""
        found: dict[str, list[bool]] = {}
        for tier in () if self._closed else self._usable():
            held: list[bool] = []
            # Others wait for the books meanwhile.
            for start in range(0, len(keys), _HELD_AT_ONCE):
                some = keys[start : start + _HELD_AT_ONCE]
                has = self._try(tier, lambda tier=tier, some=some: tier.pool.holds(some))
                held += map(bool, has or [False] * len(some))
            found[tier.name] = held
        return found

    def close(self) -> None:
        """Ends the threads, what they were given so far done, and leaves the pools."""
        if self._closed:
            return
        self._closed = True
        self._early.stop()
        self._reader.stop()
        self._writer.stop()
        for tier in self.tiers:
            tier.close()

    def _look(self, keys: Sequence[bytes]) -> list[int]:
        places = [NOWHERE] * len(keys)
        for tier in reversed(self._usable()):
            found = self._try(tier, lambda tier=tier: tier.pool.holds(keys)) or []
            for i, held in enumerate(found):
                places[i] = PLACES[tier.name] if held else places[i]
        # Of the shared memory it is known only now whether what it lacks is below it.
        end = places.index(NOWHERE) if NOWHERE in places else len(places)
        if end < len(keys):
            for tier in self._usable():
                tier.counters.miss("missing", len(keys) - end)
        return places[:end]

    def _load(self, load: Load, keys: Sequence[bytes]) -> list[np.ndarray] | str:
        staged: list[np.ndarray] = []
        start = 0
        again: list[str | None] = []
        for length, bucket in pieces(len(keys), TRANSFER_BUCKETS):
            piece = np.zeros((self.shape[0], bucket, *self.shape[1:]), self.dtype)
            chosen = range(start, start + length)
            again += self._read(load, keys, chosen, piece)
            staged.append(piece)
            start += length
        wrong = [why for why in again if why is not None]
        return f"a page is not what was asked for: {wrong[0]}" if wrong else staged

    def _read(
        self, load: Load, keys: Sequence[bytes], chosen: range, piece: np.ndarray
    ) -> list[str | None]:
        """Reads some pages of a load, each from where it was found; what was wrong with each."""
        wrong: dict[int, str | None] = dict.fromkeys(chosen, "missing")
        for tier in self._usable():
            here = [i for i in chosen if load.places[i] == PLACES[tier.name]]
            if not here:
                continue
            started = time.monotonic()
            read = self._try(
                tier,
                lambda tier=tier, here=here: tier.get(
                    [keys[i] for i in here],
                    [load.tokens[i] for i in here],
                    piece,
                    [i - chosen.start for i in here],
                    self._early_buffer if load.ahead else self._read_buffer,
                ),
            )
            tier.counters.add_read_seconds(time.monotonic() - started)
            if read is not None:
                reasons, first_used = read
                wrong.update(zip(here, reasons, strict=True))
                if tier.name == "shared" and not any(reasons):
                    self._admit(first_used, keys, load, chosen, piece)
        return list(wrong.values())

    def _admit(
        self,
        first_used: Sequence[bytes],
        keys: Sequence[bytes],
        load: Load,
        chosen: range,
        piece: np.ndarray,
    ) -> None:
        """What was used for the second time is written to the disk as well."""
        disk = self._disk()
        numbers = [i for i in chosen if keys[i] in set(first_used)]
        if disk is None or not numbers:
            return

        def act() -> None:
            for i in numbers:
                self._put(disk, keys[i], load.tokens[i], piece, i - chosen.start)

        self._writer.post(act)

    def _save(self, batch: Batch) -> list[bytes]:
        staged = np.ascontiguousarray(np.asarray(batch.staged))
        kept: list[bytes] = []
        for index, (key, tokens) in enumerate(zip(batch.keys, batch.tokens, strict=True)):
            results = [
                self._put(tier, key, tokens, staged, index)
                for tier in self._usable()
                if tier.name == "shared" or self.always
            ]
            if any(why in (None, "exists") for why in results):
                kept.append(key)
        return kept

    def _put(
        self, tier: Tier, key: bytes, tokens: Sequence[int], staged: np.ndarray, index: int
    ) -> str | None:
        started = time.monotonic()
        try:
            return tier.put(key, tokens, staged, index, self._write_buffer)
        except (OSError, PoolBusyError, PoolDamagedError) as error:
            self._note(tier, error)
            return "io"
        finally:
            tier.counters.write_seconds += time.monotonic() - started

    def _touch(self, keys: Sequence[bytes]) -> list[int]:
        shared, disk = self.tiers[0], self._disk()
        if shared not in self._usable():
            return []
        uses = self._try(shared, lambda: shared.pool.touch(keys))
        if uses is None:
            return list(range(len(keys)))
        if disk is not None:
            self._try(disk, lambda: disk.pool.touch(keys))
            for key in [key for key, count in zip(keys, uses, strict=True) if count == 0]:
                self._copy_to(disk, key)
        return [i for i, count in enumerate(uses) if count < 0]

    def _copy_to(self, disk: Tier, key: bytes) -> None:
        """Writes a page of the shared memory to the disk."""
        shared = self.tiers[0]
        if self._try(disk, lambda: disk.pool.holds([key])) != [False]:
            return
        piece = np.zeros((self.shape[0], 1, *self.shape[1:]), self.dtype)
        tokens = self._try(shared, lambda: shared.peek(key, piece, self._write_buffer))
        if tokens is not None:
            self._put(disk, key, tokens, piece, 0)

    def _disk(self) -> Tier | None:
        return next((tier for tier in self._usable() if tier.name == "disk"), None)

    def _usable(self) -> list[Tier]:
        return [tier for tier in self.tiers if tier.name not in self._damaged]

    def _try(self, tier: Tier, action: Callable[[], T]) -> T | None:
        """Does something with a tier; None if it cannot be done."""
        try:
            return action()
        except (OSError, PoolBusyError, PoolDamagedError) as error:
            self._note(tier, error)
            return None

    def _note(self, tier: Tier, error: Exception) -> None:
        """Counts what went wrong with a tier, and leaves out one that is damaged."""
        tier.counters.miss("io")
        logger.warning("KV store, %s: %s", tier.name, error)
        if isinstance(error, PoolDamagedError):
            logger.error("KV store: the %s tier is not used any more", tier.name)
            self._damaged.add(tier.name)

    def _stats(self, tier: Tier) -> TierStats:
        counters = tier.counters
        slots: dict[str, int] = {}
        recoveries = (0, 0)
        if tier.name not in self._damaged and not self._closed:
            slots = self._try(tier, tier.pool.counts) or {}
            recoveries = self._try(tier, tier.pool.recoveries) or (0, 0)
        return TierStats(
            slots,
            counters.hits,
            counters.stored,
            dict(counters.missed),
            dict(counters.refused),
            counters.bytes_read,
            counters.bytes_written,
            counters.raw_bytes_written,
            counters.read_seconds,
            counters.write_seconds,
            *recoveries,
            pool=tier.pool.identity,
        )
