"""Pages of 8 bits: what is written, read and moved is what `ml_dtypes` makes of numbers."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pshare_jax.kernels.kv_dtype import FP8, LARGEST, as_kv
from pshare_jax.kernels.kv_write.api import kv_write
from pshare_jax.kernels.page_transfer.api import gather_pages, page_checksums, scatter_pages
from pshare_jax.kernels.paged_attention.api import paged_attention
from pshare_jax.kernels.shared_prefix_attention.api import shared_prefix_attention
from tests.helpers import on_device
from tests.pairwise import some

BACKENDS = ("xla", "reference", "cpu_ffi", "pallas_gpu_interpret")
ALL = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
TABLE = jnp.asarray([[3, 1, 5], [2, 4, 6]], jnp.int32)
PAGE, KV_HEADS, GROUP, DIM = 4, 2, 3, 16


def test_numbers_are_rounded_to_the_nearest_and_bounded():
    x = jnp.asarray([0.0, 1.0, 1.06, -3.3, 447.0, 449.0, 1e30, -np.inf, 2.0**-9, 2.0**-11, np.nan])
    out = np.asarray(as_kv(x, FP8), np.float32)
    expected = [0, 1, 1, -3.25, 448, LARGEST, LARGEST, -LARGEST, 2.0**-9, 0, np.nan]
    np.testing.assert_array_equal(out, np.asarray(expected, np.float32))
    assert as_kv(x, jnp.bfloat16).dtype == jnp.bfloat16
    assert np.isposinf(float(as_kv(jnp.asarray(np.inf), jnp.bfloat16)))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if "pallas" not in b])
def test_what_is_written_is_what_is_read(backend):
    """Of every number that there is; page 0 takes what is padding."""
    pages = jnp.zeros((7, 2, KV_HEADS, PAGE, 128), FP8)
    numbers = jnp.asarray(ALL.reshape(1, 1, KV_HEADS, 128).astype(np.float32))
    rows = TABLE[:1], jnp.asarray([5], jnp.int32), jnp.asarray([1], jnp.int32)
    after = jax.jit(functools.partial(kv_write, backend=backend))(pages, numbers, -numbers, *rows)
    assert after.dtype == FP8
    kept = np.asarray(after).astype(np.float32)
    np.testing.assert_array_equal(kept[1, 0, :, 1], ALL.astype(np.float32).reshape(KV_HEADS, 128))
    np.testing.assert_array_equal(kept[1, 1, :, 1], -ALL.astype(np.float32).reshape(KV_HEADS, 128))
    kept[[0, 1]] = 0
    assert not kept.any()


@pytest.mark.parametrize(
    ("backend", "dtype"),
    some(
        itertools.product(BACKENDS, ["float32", "bfloat16"]),
        [
            ("xla", "bfloat16"),
            ("reference", "float32"),
            ("cpu_ffi", "float32"),
            ("cpu_ffi", "bfloat16"),
            ("pallas_gpu_interpret", "bfloat16"),
        ],
    ),
)
def test_one_value_comes_back_as_it_is(backend, dtype):
    """Attention to a single position gives its value: all finite numbers of 8 bits."""
    finite = np.where(np.isnan(ALL.astype(np.float32)), 0, ALL.astype(np.float32))
    pages = np.zeros((7, 2, 2, PAGE, 128), np.float32)
    pages[3, 1, :, 0] = finite.reshape(2, 128)
    attend = jax.jit(functools.partial(paged_attention, sliding_window=None, backend=backend))
    one = np.ones(1, np.int32)
    out = attend(
        on_device(np.ones((1, 1, 2, 128)), dtype), pages.astype(FP8), TABLE[:1], one * 0, one
    )
    assert out.dtype == dtype
    np.testing.assert_array_equal(np.asarray(out, np.float32)[0, 0], finite.reshape(2, 128))


in_float32 = jax.jit(
    functools.partial(paged_attention, backend="reference"), static_argnames="sliding_window"
)


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_is_that_over_the_widened_pages(backend, tokens):
    rng = np.random.default_rng(tokens)
    pages = on_device(rng.standard_normal((7, 2, KV_HEADS, PAGE, DIM)))
    small = jax.device_put(np.asarray(pages).astype(FP8))
    q = on_device(rng.standard_normal((2, tokens, KV_HEADS * GROUP, DIM)))
    rows = TABLE, jnp.asarray([5, 3], jnp.int32), jnp.full(2, tokens, jnp.int32)
    attend = jax.jit(functools.partial(paged_attention, sliding_window=4, backend=backend))
    wide = on_device(small)
    expected = in_float32(q, wide, *rows, sliding_window=4)
    np.testing.assert_allclose(attend(q, small, *rows), expected, atol=2e-5)
    if tokens == 1:
        shared = rows[0].at[1, 0].set(rows[0][0, 0])
        groups = jnp.asarray([[0, 1]], jnp.int32), jnp.asarray([PAGE], jnp.int32)
        whole = (shared, *rows[1:])
        attend = jax.jit(functools.partial(shared_prefix_attention, backend=backend))
        out = attend(q, small, *whole, *groups)
        expected = in_float32(q, wide, *whole)
        np.testing.assert_allclose(out, expected, atol=2e-5)


@pytest.mark.parametrize("backend", ["xla", "cpu_ffi"])
def test_pages_move_and_have_checksums(backend):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 256, (3, 7, 2, KV_HEADS, PAGE, DIM), np.uint8)
    pool = tuple(jax.device_put(layer.view(ml_dtypes.float8_e4m3fn)) for layer in bits)
    index = jnp.asarray([2, 5], jnp.int32)
    staged = gather_pages(pool, index, backend=backend)
    np.testing.assert_array_equal(np.asarray(staged).view(np.uint8), bits[:, [2, 5]])
    empty = tuple(jnp.zeros_like(pages) for pages in pool)
    after = scatter_pages(empty, staged, index, backend=backend)
    np.testing.assert_array_equal(np.asarray(after[1]).view(np.uint8)[[2, 5]], bits[1, [2, 5]])
    sums = page_checksums(staged, backend=backend)
    words = np.moveaxis(bits[:, [2, 5]], 1, 0).reshape(2, -1).astype(np.uint64)
    factors = 2 * np.arange(words.shape[1], dtype=np.uint64) + 1
    np.testing.assert_array_equal(sums, (words * factors).sum(1) % 2**32)
