"""Small pools, and records whose contents follow from their keys."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pshare_jax.kv.store.file import PoolRequest, Regions
from pshare_jax.kv.store.pool import Buffer, Pool

SHAPE = (2, 2, 1, 4, 16)
PAGE_BYTES = 4 * 2 * 2 * 4 * 16
TOKENS = SHAPE[-2]


def request(slots: int, *, direct: bool = False, shape: tuple[int, ...] = SHAPE) -> PoolRequest:
    """A pool of float32 pages, uncompressed, with so many slots."""
    page_bytes = 4 * int(np.prod(shape))
    wanted = PoolRequest(shape, "float32", page_bytes, 1 << 40, ("raw",), lambda: None, direct)
    spec = PoolRequest(shape, "float32", page_bytes, 1 << 20, ("raw",), lambda: None).spec("raw")
    size = Regions(type(spec)(shape, "float32", "raw", slots, spec.slot_bytes)).size
    return PoolRequest(wanted.shape, "float32", page_bytes, size, ("raw",), lambda: None, direct)


def open_pool(folder: Path, slots: int = 8, *, direct: bool = False) -> Pool:
    return Pool.open(str(folder / "pool"), request(slots, direct=direct))


def key(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


def tokens(number: int) -> list[int]:
    return [number, number + 1, number + 2, number + 3]


def contents(number: int, version: int = 0) -> np.ndarray:
    """The whole record of a key."""
    rng = np.random.default_rng([number, version])
    page = rng.integers(0, 256, PAGE_BYTES, dtype=np.uint8)
    return np.concatenate([np.array(tokens(number), np.int32).view(np.uint8), page])


def put(pool: Pool, number: int, buffer: Buffer | None = None) -> bool:
    """Writes the record of a key; False where there is no slot for it, or one already."""
    reservation = pool.reserve(key(number))
    if reservation is None:
        return False
    buffer = buffer or pool.buffer()
    record = contents(number)
    buffer.bytes[: len(record)] = record
    pool.write(reservation, buffer, len(record))
    return pool.publish(reservation, buffer.bytes[: len(record)], TOKENS)


def get(pool: Pool, number: int, wanted: Sequence[int] | None = None) -> np.ndarray | str:
    """The record of a key, or what is wrong with it; `missing` where there is none."""
    (pin,) = pool.pin([key(number)])
    if pin is None:
        return "missing"
    record = pool.read(pin, pool.buffer())
    wrong = pool.verify(pin, record, wanted or tokens(number))
    (still,) = pool.unpin([pin], [pin] if wrong else [])
    return wrong or (record.copy() if still else "generation")
