"""Random paged KV for kernel tests, with NaN wherever a kernel must not look, and an oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from tests.helpers import on_device

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-3}
"""Relative error of attention that is allowed against the oracle."""


@dataclass(frozen=True)
class Geometry:
    """The static shape of a call; `num_pages` pages a row at most."""

    batch: int
    tokens: int
    kv_heads: int
    group: int
    head_dim: int
    page_size: int
    pages_per_row: int
    sliding_window: int | None = None
    soft_cap: float | None = None

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def capacity(self) -> int:
        return self.page_size * self.pages_per_row

    @property
    def num_pages(self) -> int:
        """Pages for every row to be full, a few unused ones and page 0."""
        return self.batch * self.pages_per_row + 3

    @property
    def page_shape(self) -> tuple[int, ...]:
        return (2, self.kv_heads, self.page_size, self.head_dim)


@dataclass(frozen=True)
class Rows:
    """The run-time part of a call."""

    start: np.ndarray
    lens: np.ndarray
    seed: int


@st.composite
def rows(draw: Any, geometry: Geometry) -> Rows:
    """Any lengths that fit, with page boundaries and empty rows more often than by chance."""
    start, lens = [], []
    size = geometry.page_size
    for _ in range(geometry.batch):
        longest = min(geometry.tokens, geometry.capacity)
        count = draw(st.one_of(st.just(0), st.just(longest), st.integers(1, longest)))
        last = geometry.capacity - count
        boundary = st.integers(0, last // size).map(lambda page: page * size)
        before = boundary.map(lambda position: max(position - 1, 0))
        start.append(draw(st.one_of(boundary, before, st.integers(0, last))))
        lens.append(count)
    seed = draw(st.integers(0, 2**31))
    return Rows(np.asarray(start, np.int32), np.asarray(lens, np.int32), seed)


def page_tables(geometry: Geometry, rows: Rows, rng: np.random.Generator) -> np.ndarray:
    """Scattered pages for positions up to each row's end; 0 beyond, and before a window."""
    free = list(rng.permutation(np.arange(1, geometry.num_pages)))
    table = np.zeros((geometry.batch, geometry.pages_per_row), np.int32)
    for row in range(geometry.batch):
        first, end = visible_range(geometry, rows, row)
        for number in range(first // geometry.page_size, -(-end // geometry.page_size)):
            table[row, number] = free.pop()
    return table


def visible_range(geometry: Geometry, rows: Rows, row: int) -> tuple[int, int]:
    """The positions that any valid query of the row sees: first .. end - 1."""
    start, count = int(rows.start[row]), int(rows.lens[row])
    if count == 0:
        return 0, 0
    window = geometry.sliding_window
    return (0 if window is None else max(start - window + 1, 0)), start + count


def filled_pages(
    geometry: Geometry, rows: Rows, table: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """NaN pages with numbers in the slots that some query sees, and there only."""
    pages = np.full((geometry.num_pages, *geometry.page_shape), np.nan, np.float32)
    for row in range(geometry.batch):
        for position in range(*visible_range(geometry, rows, row)):
            page, slot = divmod(position, geometry.page_size)
            token = rng.standard_normal((2, geometry.kv_heads, geometry.head_dim))
            pages[table[row, page], :, :, slot] = token
    return pages


def attention_oracle(
    geometry: Geometry, q: np.ndarray, pages: np.ndarray, table: np.ndarray, rows: Rows
) -> tuple[np.ndarray, np.ndarray]:
    """Attention query by query in float64; 0 for queries past a row's length.

    Returns:
        The result, a sum over keys; and the root of the sum of the squares of its terms: what
        errors of the terms, each for itself, are a share of, also where the terms cancel out.
    """
    out, spread = np.zeros(q.shape, np.float64), np.zeros(q.shape, np.float64)
    q, pages = q.astype(np.float64), pages.astype(np.float64)
    for row in range(geometry.batch):
        for token in range(rows.lens[row]):
            position = rows.start[row] + token
            window = geometry.sliding_window
            first = 0 if window is None else max(position - window + 1, 0)
            seen = np.arange(first, position + 1)
            kv = pages[table[row, seen // geometry.page_size], :, :, seen % geometry.page_size]
            for head in range(geometry.heads):
                k, v = kv[:, 0, head // geometry.group], kv[:, 1, head // geometry.group]
                scores = k @ q[row, token, head] / np.sqrt(geometry.head_dim)
                if geometry.soft_cap is not None:
                    scores = geometry.soft_cap * np.tanh(scores / geometry.soft_cap)
                weights = np.exp(scores - scores.max())
                out[row, token, head] = weights @ v / weights.sum()
                spread[row, token, head] = np.sqrt(weights**2 @ v**2) / weights.sum()
    return out, spread


def relative_error(
    actual: np.ndarray, expected: np.ndarray, spread: np.ndarray, dtype: str
) -> float:
    """Norm of the difference over that of what is expected and its spread, see `attention_oracle`:
    a bfloat16 kernel rounds the softmax's weights, and the result may be small where they are not.

    Differences that rounding the exact result to `dtype` can make are left out.
    """
    rounding = np.abs(expected) * float(jnp.finfo(dtype).eps) / 2
    difference = np.maximum(np.abs(actual.astype(np.float64) - expected) - rounding, 0.0)
    size = np.hypot(np.linalg.norm(expected), np.linalg.norm(spread))
    return float(np.linalg.norm(difference) / max(size, 1e-30))


def assert_equals_oracle(attend: Any, geometry: Geometry, dtype: str, case: Rows) -> None:
    """Compares `attend(q, pages, page_table, q_start, q_lens)` with the oracle on random KV."""
    rng = np.random.default_rng(case.seed)
    table = page_tables(geometry, case, rng)
    pages = on_device(filled_pages(geometry, case, table, rng), dtype)
    shape = (geometry.batch, geometry.tokens, geometry.heads, geometry.head_dim)
    q = on_device(rng.standard_normal(shape), dtype)

    out = attend(q, pages, table, case.start, case.lens)

    assert out.shape == shape
    assert out.dtype == dtype
    actual = np.asarray(out, np.float32)
    assert np.isfinite(actual).all()
    valid = np.arange(geometry.tokens) < case.lens[:, None]
    expected, spread = attention_oracle(geometry, np.asarray(q), np.asarray(pages), table, case)
    error = relative_error(actual[valid], expected[valid], spread[valid], dtype)
    assert error <= TOLERANCE[dtype]
