"""Moving prompt pages from a prefill pool to a decode pool: gather -> device_put -> scatter.

The prefill thread gathers and moves; the decode thread, owner of its pool, scatters.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import Sharding

from pshare_jax.cache.pool import PagePool, Pages
from pshare_jax.engine.buckets import TRANSFER_BUCKETS, pieces
from pshare_jax.kernels.page_transfer.api import gather_pages, scatter_pages


@dataclass
class Staged:
    """Pages on the decode mesh that are not in its pool yet, and where they go."""

    pages: jax.Array
    indices: np.ndarray


def padded_indices(pages: list[int], bucket: int) -> np.ndarray:
    """int32 page indices, padded with the padding page 0 to length `bucket`."""
    indices = np.zeros(bucket, np.int32)
    indices[: len(pages)] = pages
    return indices


class Sender:
    """The prefill side of a handoff."""

    def __init__(self, staging: Sharding, backend: str):
        self._gather = jax.jit(
            lambda pages, indices: gather_pages(pages, indices, backend=backend),
            out_shardings=staging,
        )

    def move(
        self, pool: PagePool, source: list[int], target: list[int], sharding: Sharding
    ) -> list[Staged]:
        """Copies pages `source` of `pool` to the decode mesh of `sharding`; blocks until there.

        Blocking keeps the decode mesh free of work that waits for a prefill to end.
        """
        staged: list[Staged] = []
        start = 0
        for length, bucket in pieces(len(source), TRANSFER_BUCKETS):
            indices = padded_indices(source[start : start + length], bucket)
            gathered = pool.read(lambda pages, indices=indices: self._gather(pages, indices))
            moved = jax.device_put(gathered, sharding)
            staged.append(Staged(moved, padded_indices(target[start : start + length], bucket)))
            start += length
        jax.block_until_ready([s.pages for s in staged])
        return staged


class Receiver:
    """The decode side of a handoff."""

    def __init__(self, pages: Sharding | Format, backend: str):
        self._scatter = jax.jit(
            lambda pages, staged, indices: scatter_pages(pages, staged, indices, backend=backend),
            donate_argnums=0,
            out_shardings=pages,
        )

    def store(self, pool: PagePool, staged: list[Staged]) -> None:
        """Writes staged pages into `pool`; owner thread only."""
        for item in staged:

            def scatter(pages: Pages, item: Staged = item) -> tuple[Pages, None]:
                return self._scatter(pages, item.pages, item.indices), None

            pool.update(scatter)
