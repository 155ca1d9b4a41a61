"""Attention sinks: every backend against the definition, on meshes, and over shared pages."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from pshare_jax.kernels.paged_attention.api import paged_attention
from pshare_jax.kernels.shared_prefix_attention.api import shared_prefix_attention
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


BACKENDS = ("xla", "reference", "cpu_ffi", "pallas_tpu_interpret", "pallas_gpu_interpret")
SINKS = np.asarray([-30.0, 0.0, 1.0, 3.0, 30.0, -1.0])


def case(tokens, starts):
    """Queries, keys and values in float64, and pages with NaN where nothing has been written."""
    rng = np.random.default_rng(tokens)
    q = rng.standard_normal((2, tokens, HEADS, DIM))
    kv = rng.standard_normal((2, 2, 16, KV_HEADS, DIM))
    # Both rows begin with the same page.
    kv[:, 1, :PAGE] = kv[:, 0, :PAGE]
    pages = np.full((9, 2, KV_HEADS, PAGE, DIM), np.nan)
    for b, j in np.ndindex(2, 16):
        if j < starts[b] + tokens:
            pages[TABLE[b, j // PAGE], :, :, j % PAGE] = kv[:, b, j]
    return q, kv, pages


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_takes_weight_and_gives_nothing(backend, tokens, window):
    starts = np.asarray([7, 4])
    q, kv, pages = case(tokens, starts)
    attend = jax.jit(functools.partial(paged_attention, sliding_window=window, backend=backend))
    out = attend(
        jnp.asarray(q, jnp.float32),
        jnp.asarray(pages, jnp.float32),
        TABLE,
        jnp.asarray(starts, jnp.int32),
        jnp.full(2, tokens, jnp.int32),
        sinks=jnp.asarray(SINKS, jnp.float32),
    )
    expected = by_definition(q, *kv, SINKS, starts, window)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    positions = starts[:, None] + np.arange(tokens)
    mask = causal_mask(jnp.asarray(positions), jnp.arange(16), window)
    operands = (jnp.asarray(a, jnp.float32) for a in (q, *kv))
    dense = dense_attention(*operands, mask, sinks=jnp.asarray(SINKS, jnp.float32))
    np.testing.assert_allclose(dense, expected, atol=2e-5)
    assert np.abs(expected[:, :, 4]).max() < 1e-9


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_count_once_where_pages_are_shared(backend, window):
    starts = np.asarray([7, 4])
    q, kv, pages = case(1, starts)
    attend = functools.partial(shared_prefix_attention, sliding_window=window, backend=backend)
    out = jax.jit(attend)(
        jnp.asarray(q, jnp.float32),
        jnp.asarray(pages, jnp.float32),
        TABLE.at[1, 0].set(TABLE[0, 0]),
        jnp.asarray(starts, jnp.int32),
        jnp.ones(2, jnp.int32),
        jnp.asarray([[0, 1]], jnp.int32),
        jnp.asarray([PAGE], jnp.int32),
        sinks=jnp.asarray(SINKS, jnp.float32),
    )
    expected = by_definition(q, *kv, SINKS, starts, window)
    np.testing.assert_allclose(out, expected, atol=2e-5)


@pytest.mark.parametrize("degree", [2, 4])
def test_sinks_go_with_their_heads(degree):
    """KV heads split over a mesh, and replicated."""
    starts, group = np.asarray([7, 4]), 4
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 1, 2 * group, DIM)), jnp.float32)
    pages = jnp.asarray(rng.standard_normal((9, 2, KV_HEADS, PAGE, DIM)), jnp.float32)
    sinks = jnp.asarray(rng.standard_normal(2 * group), jnp.float32)
    rows = TABLE, jnp.asarray(starts, jnp.int32), jnp.ones(2, jnp.int32)
    mesh = Mesh(np.asarray(jax.devices()[:degree]), ("tensor",))
    expected = paged_attention(q, pages, *rows, sinks=sinks, backend="reference")
    backend = "pallas_gpu_interpret"
    out = paged_attention(q, pages, *rows, sinks=sinks, backend=backend, mesh=mesh)
    np.testing.assert_allclose(out, expected, atol=2e-5)


def test_a_number_of_sinks_that_is_not_that_of_heads_is_an_error():
    q, pages = jnp.zeros((1, 1, HEADS, DIM)), jnp.zeros((2, 2, KV_HEADS, PAGE, DIM))
    one = jnp.ones((1, 1), jnp.int32)
    attend = functools.partial(paged_attention, q, pages, one, one[0] * 0, one[0])
    with pytest.raises(Exception, match="there must be a sink for each head, or none"):
        jax.block_until_ready(attend(sinks=jnp.zeros(HEADS + 1), backend="cpu_ffi"))
