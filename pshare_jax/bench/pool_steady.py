"""What pages cost on their way, one piece after the other, for `bench pool`: no engine computes."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from pshare_jax.bench.pool_first import FirstEngine
from pshare_jax.bench.pool_socket import wait_for
from pshare_jax.core.plans import Pull
from pshare_jax.kernels.kv_codec.codebook import Codebook
from pshare_jax.kv.remote import RemotePages
from pshare_jax.kv.store.file import BLOCK, PoolRequest
from pshare_jax.kv.store.pool import Pool
from pshare_jax.kv.store.tier import Tier

T = TypeVar("T")

_PIECES = 4
"""Pieces that a pool has room for; older ones are overwritten."""

_FIRST_TRANSFER = 1 << 40
"""Beyond those of the engines."""


@dataclass(frozen=True)
class Way:
    """What pages cost, as they are in a device's pool: GB/s, and processor ms a page, of writing
    them where others can get them, and of getting them, checked, into the memory of the host."""

    write_gb_s: float
    write_cpu_ms: float
    read_gb_s: float
    read_cpu_ms: float


@dataclass
class Times:
    """Wall and processor seconds of repeats."""

    wall: list[float]
    cpu: list[float]

    def figures(self, pages: int, page_bytes: int) -> tuple[float, float]:
        """GB/s of the median repeat, and processor ms a page over all of them."""
        rate = pages * page_bytes / statistics.median(self.wall) / 1e9
        return rate, 1e3 * sum(self.cpu) / len(self.cpu) / pages


def through_pool(
    codec: str, book: Codebook | None, staged: np.ndarray, folder: Path, rounds: int
) -> Way:
    """Pages through a pool of their own.

    Args:
        codec: of the pool.
        book: its codebook, None for `raw`.
        staged: the pages, `[L, n, 2, kv_heads, page_size, head_dim]`.
        folder: for the pool's file.
        rounds: how often, in pieces of all n.
    """
    layers, count, *rest = staged.shape
    page_bytes = staged.nbytes // count
    num_bytes = (_PIECES + 1) * count * (page_bytes + 2 * BLOCK) + 2**20
    shape = (layers, *rest)
    request = PoolRequest(shape, staged.dtype.name, page_bytes, num_bytes, (codec,), lambda: book)
    tier = Tier("shared", Pool.open(str(folder / f"steady-{codec}"), request))
    buffer, tokens = tier.pool.buffer(), [tuple(range(shape[-2]))] * count
    into, places = np.zeros_like(staged), range(count)
    writes, reads = Times([], []), Times([], [])
    try:
        for _ in range(rounds + 1):
            keys = [os.urandom(16) for _ in places]
            wrong = timed(
                writes,
                lambda keys=keys: [tier.put(keys[i], tokens[i], staged, i, buffer) for i in places],
            )
            assert not any(wrong), wrong
            wrong, _ = timed(reads, lambda keys=keys: tier.get(keys, tokens, into, places, buffer))
            assert not any(wrong), wrong
        assert into.tobytes() == staged.tobytes(), "pages came back other than they were"
    finally:
        tier.close()
    return _way(writes, reads, count, page_bytes)


def through_socket(
    first: FirstEngine, remote: RemotePages, count: int, page_bytes: int, rounds: int
) -> Way:
    """Pages from the first engine's process, `count` in a transfer; both processes' time counts.

    What they cost is copying, whatever they hold. Their checksum is taken, as it is of all that
    comes from elsewhere.
    """
    writes, reads = Times([], []), Times([], [])
    for transfer in range(_FIRST_TRANSFER, _FIRST_TRANSFER + rounds + 1):
        piece, seconds, cpu = first.offer(transfer, count)
        writes.wall.append(seconds)
        writes.cpu.append(cpu)
        there = first.cpu()
        timed(reads, lambda piece=piece: _pull(remote, piece.pull()))
        reads.cpu[-1] += first.cpu() - there
    return _way(writes, reads, count, page_bytes)


def timed(times: Times, action: Callable[[], T]) -> T:
    """Does something, and notes what it takes of this process."""
    started, used = time.perf_counter(), time.process_time()
    result = action()
    times.wall.append(time.perf_counter() - started)
    times.cpu.append(time.process_time() - used)
    return result


def _pull(remote: RemotePages, pull: Pull) -> None:
    remote.accept(pull)
    wait_for(remote, pull.transfer)
    remote.abort(pull.transfer)


def _way(writes: Times, reads: Times, count: int, page_bytes: int) -> Way:
    # The first round touches memory for the first time.
    later = [Times(times.wall[1:], times.cpu[1:]) for times in (writes, reads)]
    (write, write_cpu), (read, read_cpu) = (t.figures(count, page_bytes) for t in later)
    return Way(write, write_cpu, read, read_cpu)


def lines(ways: dict[str, dict[str, float]], page_bytes: int) -> Sequence[str]:
    """The table as lines of text."""
    shown = [
        f"Steady state, pages of {page_bytes / 1e6:.2f} MB: written at GB/s (processor ms a page), "
        "read and checked at GB/s (processor ms a page)"
    ]
    for name, way in ways.items():
        shown.append(
            f"  {name}: {way['write_gb_s']:.2f} ({way['write_cpu_ms']:.2f}), "
            f"{way['read_gb_s']:.2f} ({way['read_cpu_ms']:.2f})"
        )
    return shown
