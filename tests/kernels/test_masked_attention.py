"""Attention of training in C++, and its gradient, against XLA's in float32."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.kernels.masked_attention.cpu_ffi import masked_attention
from pshare_jax.models.attention import dense_attention
from tests.helpers import on_device

# Batch, queries, keys, query heads, KV heads, head dim: one of each; several blocks of queries and
# of keys; an odd number of everything; more queries of a head than a block has; wide heads; so many
# heads that none is cut into parts.
SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (2, 136, 168, 9, 3, 64),
    (3, 37, 71, 3, 1, 26),
    (1, 3, 130, 112, 1, 16),
    (1, 50, 50, 2, 2, 80),
    (12, 37, 45, 9, 3, 16),
]
ROUNDING = 0.006
"""Of a norm: weights, their gradients and results are rounded to bfloat16, each by 2^-9 at most and
0.0011 of the norm on average; sums of such products have several of them."""


def operands(shape, window=None):
    """q, k, v and the gradient of the result, in bfloat16, and a mask whose queries stand last."""
    B, T, S, H, K, D = shape
    rng = np.random.default_rng(0)
    arrays = [
        on_device(rng.standard_normal(size), "bfloat16")
        for size in ((B, T, H, D), (B, S, K, D), (B, S, K, D), (B, T, H, D))
    ]
    query, key = np.arange(T)[:, None] + S - T, np.arange(S)
    mask = (key <= query) & (key > query - (window or S))
    # Rows differ: some see fewer of the first keys.
    hidden = key < np.minimum(4 * np.arange(B), S - T)[:, None, None]
    return *arrays, jax.device_put(mask & ~hidden)


@functools.partial(jax.jit, static_argnums=(0,))
def with_gradients(attend, q, k, v, gradient, mask):
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
    return out, *pull(gradient.astype(out.dtype))


def in_float32(*arrays):
    *wide, mask = arrays
    return with_gradients(dense_attention, *map(on_device, wide), mask)


def assert_close(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        mine, other = np.asarray(mine, np.float64), np.asarray(other, np.float64)
        assert np.linalg.norm(mine - other) <= ROUNDING * np.linalg.norm(other) + 1e-6


@pytest.mark.parametrize("window", [None, 40], ids=["causal", "window"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers(shape, window):
    arrays = operands(shape, window)
    ours = with_gradients(masked_attention, *arrays)
    assert all(array.dtype == jnp.bfloat16 for array in ours)
    assert_close(ours, in_float32(*arrays))


@pytest.mark.parametrize("constant", [1, 32, 45])
def test_constant_keys_have_no_gradient(constant):
    arrays = operands((2, 37, 71, 4, 2, 32))
    attend = functools.partial(masked_attention, constant_keys=constant)
    out, dq, dk, dv = map(np.asarray, with_gradients(attend, *arrays))
    expected = list(map(np.asarray, in_float32(*arrays)))
    for gradient in (dk, dv):
        assert not gradient[:, :constant].astype(np.float32).any()
    kept = [array[:, constant:] for array in (dk, dv)]
    assert_close((out, dq, *kept), (*expected[:2], *(a[:, constant:] for a in expected[2:])))


def test_a_query_that_sees_nothing():
    q, k, v, gradient, mask = operands((2, 5, 40, 4, 2, 16))
    mask = np.array(mask)
    mask[1] = False
    found = with_gradients(masked_attention, q, k, v, gradient, mask)[:3]
    out, dq, dk = (np.asarray(array, np.float32) for array in found)
    for array in (out[1], dq[1], dk[1]):
        assert not array.any()
    assert out[0].all()


def test_what_is_not_a_number_comes_out():
    q, k, v, gradient, mask = operands((1, 5, 40, 4, 2, 16))
    for poisoned in (q.at[0, 2].set(jnp.nan), q.at[0, 2].set(jnp.inf)):
        out = np.asarray(with_gradients(masked_attention, poisoned, k, v, gradient, mask)[0])
        assert np.isnan(out[0, 2].astype(np.float32)).all()
        assert np.isfinite(out[0, 3].astype(np.float32)).all()


def test_bits_do_not_depend_on_threads():
    arrays = operands((2, 40, 60, 6, 2, 32))

    def run(_) -> list[bytes]:
        return [np.asarray(a).tobytes() for a in with_gradients(masked_attention, *arrays)]

    alone = run(0)
    with ThreadPoolExecutor(3) as threads:
        assert all(bits == alone for bits in threads.map(run, range(12)))


def test_what_it_does_not_take():
    q, k, v, _, mask = operands((1, 5, 40, 4, 2, 16))
    with pytest.raises(ValueError, match="bfloat16 only, not float32"):
        masked_attention(q.astype(jnp.float32), k, v, mask)
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not belong together"):
        jax.block_until_ready(masked_attention(q, k, v, mask[:, :, 1:]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="mask must be bool"):
        jax.block_until_ready(masked_attention(q, k, v, mask.astype(jnp.int8)))
