"""Attention sinks: paged attention against its definition, and backends that have none."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.kernels.paged_attention.api import paged_attention
from pshare_jax.models.attention import causal_mask, dense_attention

KV_HEADS, GROUP, DIM, PAGE = 2, 3, 8, 4
HEADS = KV_HEADS * GROUP
TABLE = jnp.asarray([[3, 1, 7, 5], [2, 8, 4, 6]], jnp.int32)


def by_definition(q, k, v, sinks, starts, window):
    """In float64: q `[B, T, H, D]`, k and v `[B, S, KH, D]`."""
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(*q.shape[:3]):
        at = starts[b] + t
        keys = [j for j in range(at + 1) if window is None or j > at - window]
        scores = np.asarray([q[b, t, h] @ k[b, j, h // GROUP] for j in keys]) / np.sqrt(DIM)
        weights = np.exp(scores)
        total = weights.sum() + np.exp(sinks[h])
        out[b, t, h] = (weights / total) @ v[b, keys, h // GROUP]
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_a_sink_takes_weight_and_gives_nothing(backend, tokens, window):
    rng = np.random.default_rng(tokens)
    starts = np.asarray([7, 2])
    q = rng.standard_normal((2, tokens, HEADS, DIM))
    kv = rng.standard_normal((2, 2, 16, KV_HEADS, DIM))
    sinks = np.asarray([-30.0, 0.0, 1.0, 3.0, 30.0, -1.0])
    pages = np.full((9, 2, KV_HEADS, PAGE, DIM), np.nan)
    for b, j in np.ndindex(2, 16):
        if j < starts[b] + tokens:
            pages[TABLE[b, j // PAGE], :, :, j % PAGE] = kv[:, b, j]
    attend = jax.jit(functools.partial(paged_attention, sliding_window=window, backend=backend))
    out = attend(
        jnp.asarray(q, jnp.float32),
        jnp.asarray(pages, jnp.float32),
        TABLE,
        jnp.asarray(starts, jnp.int32),
        jnp.full(2, tokens, jnp.int32),
        sinks=jnp.asarray(sinks, jnp.float32),
    )
    expected = by_definition(q, *kv, sinks, starts, window)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    positions = starts[:, None] + np.arange(tokens)
    mask = causal_mask(jnp.asarray(positions), jnp.arange(16), window)
    operands = (jnp.asarray(a, jnp.float32) for a in (q, *kv))
    dense = dense_attention(*operands, mask, sinks=jnp.asarray(sinks, jnp.float32))
    np.testing.assert_allclose(dense, expected, atol=2e-5)
    assert np.abs(expected[:, :, 4]).max() < 1e-9


@pytest.mark.parametrize("backend", ["cpu_ffi", "pallas_tpu", "pallas_gpu"])
def test_backends_without_sinks_say_so(backend):
    q = jnp.zeros((1, 1, HEADS, DIM))
    pages = jnp.zeros((2, 2, KV_HEADS, PAGE, DIM))
    one = jnp.ones((1, 1), jnp.int32)
    with pytest.raises(ValueError, match=f"backend '{backend}' has no sinks; xla has"):
        paged_attention(q, pages, one, one[0], one[0], sinks=jnp.zeros(HEADS), backend=backend)
