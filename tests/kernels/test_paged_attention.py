"""Every backend of paged attention against one oracle, with NaN wherever it must not look."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pshare_jax.kernels.paged_attention.api import paged_attention
from tests.kernels.paged_cases import TOLERANCE, Geometry, assert_equals_oracle, rows

BACKENDS = ["xla", "reference"]

DECODE = Geometry(3, 1, kv_heads=2, group=3, head_dim=16, page_size=4, pages_per_row=12)
GEOMETRIES = {
    "decode": DECODE,
    "decode, window": Geometry(3, 1, 2, 3, 16, 4, 12, sliding_window=9),
    "decode, one head, one slot a page": Geometry(2, 1, 1, 1, 8, 1, 20),
    "prefix": Geometry(2, 7, 2, 2, 8, 4, 10),
    "prefix, no groups": Geometry(2, 5, 3, 1, 8, 8, 3),
    "prefix, window": Geometry(2, 7, 2, 2, 8, 4, 10, sliding_window=5),
    "decode, soft cap": Geometry(2, 1, 2, 2, 16, 4, 12, soft_cap=0.5),
    "prefix, soft cap": Geometry(2, 7, 2, 2, 8, 4, 10, soft_cap=2.0),
    "window of one": Geometry(2, 3, 1, 2, 8, 4, 4, sliding_window=1),
    "several tiles": Geometry(1, 300, 1, 2, 8, 16, 24),
    "several tiles, window": Geometry(1, 300, 1, 2, 8, 16, 24, sliding_window=130),
}


@functools.cache
def compiled(backend: str, sliding_window: int | None, soft_cap: float | None):
    return jax.jit(
        functools.partial(
            paged_attention, sliding_window=sliding_window, soft_cap=soft_cap, backend=backend
        )
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_equals_the_oracle(backend, geometry, dtype, data):
    case = data.draw(rows(geometry))
    attend = compiled(backend, geometry.sliding_window, geometry.soft_cap)
    assert_equals_oracle(attend, geometry, dtype, case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    rng = np.random.default_rng(0)
    geometry = DECODE
    pages = rng.standard_normal((geometry.num_pages, *geometry.page_shape)).astype(np.float32)
    q = 1e4 * np.ones((1, 1, geometry.heads, geometry.head_dim), np.float32)
    table = np.arange(1, 13, dtype=np.int32)[None]
    start, lens = np.asarray([47], np.int32), np.asarray([1], np.int32)
    out = compiled(backend, None, None)(q, pages, table, start, lens)
    # Scores are so far apart that every head returns the value of its best key.
    kv = pages[1:13].transpose(1, 2, 0, 3, 4).reshape(2, geometry.kv_heads, 48, geometry.head_dim)
    best = kv[0].sum(axis=-1).argmax(axis=-1)
    for head in range(geometry.heads):
        kv_head = head // geometry.group
        np.testing.assert_allclose(out[0, 0, head], kv[1, kv_head, best[kv_head]], rtol=1e-5)


def test_heads_must_be_groups():
    q, pages = jnp.zeros((1, 1, 3, 8)), jnp.zeros((2, 2, 2, 4, 8))
    table, row = jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="3 heads are no multiple of 2 KV heads"):
        paged_attention(q, pages, table, row, row)


def test_unknown_backend_is_named():
    q, pages = jnp.zeros((1, 1, 2, 8)), jnp.zeros((2, 2, 2, 4, 8))
    table, row = jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="unknown backend 'cuda'; choose one of auto, xla"):
        paged_attention(q, pages, table, row, row, backend="cuda")
