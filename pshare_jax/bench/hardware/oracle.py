"""Attention over pages by its definition, in numpy and float64, and the cases that are compared.

Whatever a kernel must not look at is NaN. No package is needed that serving does without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-3}
"""Relative error that is allowed, beside the rounding of the result."""


@dataclass(frozen=True)
class Case:
    """One call: rows of random lengths, or all of them beginning with `shared_pages` pages."""

    batch: int
    tokens: int
    kv_heads: int
    group: int
    head_dim: int
    page_size: int
    pages_per_row: int
    sliding_window: int | None = None
    soft_cap: float | None = None
    shared_pages: int = 0


CASES = {
    "decode": Case(8, 1, 2, 4, 128, 32, 8),
    "decode, window, soft cap": Case(4, 1, 3, 3, 64, 16, 16, sliding_window=50, soft_cap=2.0),
    "decode, head of 80": Case(4, 1, 2, 5, 80, 64, 4),
    "prefix": Case(2, 100, 2, 4, 128, 32, 8),
    "prefix, head of 256": Case(2, 70, 1, 8, 256, 64, 4, sliding_window=100),
    "one context": Case(6, 1, 2, 4, 128, 32, 12, shared_pages=9),
    "one context, window": Case(6, 1, 2, 3, 64, 16, 12, sliding_window=50, shared_pages=7),
}


def attention_error(case: Case, dtype: str, attend: Callable[..., Any]) -> float:
    """Norm of a kernel's error over that of the result; infinite where it gives no numbers.

    Args:
        case: the call.
        dtype: of queries and pages.
        attend: takes what `shared_prefix_attention` does where pages are shared, and what
            `paged_attention` does otherwise.
    """
    rng = np.random.default_rng(0)
    start, lens = _lengths(case, rng)
    table = _page_table(case, start, lens, rng)
    # By NumPy: each shape would be compiled.
    pages = _pages(case, start, lens, table, rng).astype(np.float32).astype(jnp.dtype(dtype))
    shape = (case.batch, case.tokens, case.kv_heads * case.group, case.head_dim)
    q = rng.standard_normal(shape).astype(np.float32).astype(jnp.dtype(dtype))
    runs = []
    if case.shared_pages:
        runs = [
            np.arange(case.batch, dtype=np.int32)[None],
            np.full(1, case.shared_pages * case.page_size, np.int32),
        ]
    given = (jax.device_put(q), jax.device_put(pages), table, start, lens, *runs)
    actual = np.asarray(attend(*given), np.float64)
    expected = _attention(case, q.astype(np.float64), pages.astype(np.float64), table, start, lens)
    valid = np.arange(case.tokens) < lens[:, None]
    if not np.isfinite(actual).all():
        return float("inf")
    rounding = np.abs(expected) * float(jnp.finfo(dtype).eps) / 2
    difference = np.maximum(np.abs(actual - expected) - rounding, 0.0)
    return float(np.linalg.norm(difference[valid]) / np.linalg.norm(expected[valid]))


def _lengths(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Where each row's queries begin, and how many it has: one row in eight has none."""
    capacity = case.page_size * case.pages_per_row
    lens = rng.integers(1, case.tokens + 1, case.batch)
    if not case.shared_pages:
        lens[::8] = 0
        lens[1] = case.tokens
    least = case.shared_pages * case.page_size
    start = np.array([rng.integers(least, capacity - n + 1) for n in lens])
    return start.astype(np.int32), lens.astype(np.int32)


def _seen(case: Case, start: int, count: int) -> range:
    """Positions that some query of a row sees."""
    if not count:
        return range(0)
    window = case.sliding_window
    return range(0 if window is None else max(start - window + 1, 0), start + count)


def _page_table(
    case: Case, start: np.ndarray, lens: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    free = list(rng.permutation(np.arange(1, case.batch * case.pages_per_row + 1)))
    table = np.zeros((case.batch, case.pages_per_row), np.int32)
    for row in range(case.batch):
        for page in sorted({p // case.page_size for p in _seen(case, start[row], lens[row])}):
            table[row, page] = free.pop()
    # A run is read from any member: all see the same pages, of the one that sees most of it.
    if case.shared_pages:
        table[:, : case.shared_pages] = table[int(start.argmin()), : case.shared_pages]
    return table


def _pages(
    case: Case, start: np.ndarray, lens: np.ndarray, table: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Numbers in the slots that some query sees, NaN in all others."""
    count = case.batch * case.pages_per_row + 1
    pages = np.full((count, 2, case.kv_heads, case.page_size, case.head_dim), np.nan, np.float32)
    for row in range(case.batch):
        for position in _seen(case, start[row], lens[row]):
            page, slot = divmod(position, case.page_size)
            token = rng.standard_normal((2, case.kv_heads, case.head_dim))
            if np.isnan(pages[table[row, page], 0, 0, slot, 0]):
                pages[table[row, page], :, :, slot] = token
    return pages


def _attention(
    case: Case,
    q: np.ndarray,
    pages: np.ndarray,
    table: np.ndarray,
    start: np.ndarray,
    lens: np.ndarray,
) -> np.ndarray:
    out = np.zeros(q.shape)
    for row in range(case.batch):
        for token in range(lens[row]):
            position = start[row] + token
            window = case.sliding_window
            seen = np.arange(0 if window is None else max(position - window + 1, 0), position + 1)
            kv = pages[table[row, seen // case.page_size], :, :, seen % case.page_size]
            k, v = kv[:, 0].repeat(case.group, axis=1), kv[:, 1].repeat(case.group, axis=1)
            scores = np.einsum("shd,hd->hs", k, q[row, token]) / np.sqrt(case.head_dim)
            if case.soft_cap is not None:
                scores = case.soft_cap * np.tanh(scores / case.soft_cap)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[row, token] = np.einsum("hs,shd->hd", weights, v)
    return out
