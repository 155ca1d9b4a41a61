"""The prefill module's KV of a text, as pages: for what has to know how it looks."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from pshare_jax.cluster.worker import PrefillWorker
from pshare_jax.core.buckets import TRANSFER_BUCKETS, pieces
from pshare_jax.core.plans import Chunk, PrefillPlan
from pshare_jax.engine.sources import BASE
from pshare_jax.runtime.executor import PrefillExecutor


def chunk_plan(
    executor: PrefillExecutor, pages: list[int], start: int, tokens: Sequence[int]
) -> PrefillPlan:
    """A call of the longest chunk that computes `tokens` at positions from `start` on."""
    bucket = max(executor.programs.chunk_buckets)
    chunk = Chunk(0, pages, start, tuple(tokens))
    return PrefillPlan(weights=BASE, shape=(1, bucket), chunks=[chunk])


def prompt_pages(worker: PrefillWorker[PrefillExecutor], tokens: Sequence[int]) -> np.ndarray:
    """Computes the base's KV of a prompt.

    Args:
        worker: warmed up and not started, so that all its pages are free.
        tokens: at most as many as its pool holds.

    Returns:
        `[n, L, 2, kv_heads, page_size, head_dim]` of the pool's dtype, the full pages.
    """
    executor, page_size = worker.executor, worker.cache.page_size
    bucket = max(executor.programs.chunk_buckets)
    pages = list(range(1, -(-len(tokens) // page_size) + 1))
    executor.pool.own()
    for start in range(0, len(tokens), bucket):
        executor.compute(chunk_plan(executor, pages, start, tokens[start : start + bucket]))
    staged, first = [], 0
    for length, padded in pieces(len(tokens) // page_size, TRANSFER_BUCKETS):
        staged.append(_gather(executor, pages[first : first + length], padded)[:, :length])
        first += length
    executor.pool.disown()
    return np.ascontiguousarray(np.moveaxis(np.concatenate(staged, axis=1), 1, 0))


def _gather(executor: PrefillExecutor, pages: list[int], padded: int) -> np.ndarray:
    indices = np.zeros(padded, np.int32)
    indices[: len(pages)] = pages
    staged: jax.Array = executor.pool.read(lambda arrays: executor.programs.gather(arrays, indices))
    return np.asarray(staged)
