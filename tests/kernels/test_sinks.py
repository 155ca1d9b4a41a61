"""Attention sinks: every backend against the definition, on meshes, and over shared pages."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from pshare_jax.kernels.paged_attention.api import paged_attention
from pshare_jax.kernels.shared_prefix_attention.api import shared_prefix_attention
from pshare_jax.models.attention import causal_mask, dense_attention
from tests.pairwise import pairwise, some

KV_HEADS, GROUP, DIM, PAGE = 2, 3, 8, 4
HEADS = KV_HEADS * GROUP
TABLE = np.asarray([[3, 1, 7, 5], [2, 8, 4, 6]], np.int32)


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


STARTS = np.asarray([7, 4], np.int32)


def float32(*arrays):
    return [np.asarray(array, np.float32) for array in arrays]


@pairwise(backend=BACKENDS, tokens=[1, 5], window=[None, 3])
def test_a_sink_takes_weight_and_gives_nothing(backend, tokens, window):
    q, kv, pages = case(tokens, STARTS)
    attend = jax.jit(functools.partial(paged_attention, sliding_window=window, backend=backend))
    queries, pages, sinks = float32(q, pages, SINKS)
    out = attend(queries, pages, TABLE, STARTS, np.full(2, tokens, np.int32), sinks=sinks)
    expected = by_definition(q, *kv, SINKS, STARTS, window)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    assert np.abs(expected[:, :, 4]).max() < 1e-9


@pytest.mark.parametrize(("tokens", "window"), [(1, None), (5, 3)])
def test_sinks_of_dense_attention(tokens, window):
    q, kv, _ = case(tokens, STARTS)
    positions = STARTS[:, None] + np.arange(tokens, dtype=np.int32)
    mask = causal_mask(positions, np.arange(16, dtype=np.int32), window)
    operands, sinks = float32(q, *kv), np.asarray(SINKS, np.float32)
    dense = jax.jit(dense_attention)(*operands, mask, sinks=sinks)
    expected = by_definition(q, *kv, SINKS, STARTS, window)
    np.testing.assert_allclose(dense, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("backend", "window"),
    some(
        itertools.product(BACKENDS, [None, 6]),
        [(backend, (None, 6)[i % 2]) for i, backend in enumerate(BACKENDS)],
    ),
)
def test_sinks_count_once_where_pages_are_shared(backend, window):
    q, kv, pages = case(1, STARTS)
    attend = functools.partial(shared_prefix_attention, sliding_window=window, backend=backend)
    queries, pages, sinks = float32(q, pages, SINKS)
    table = TABLE.copy()
    table[1, 0] = table[0, 0]
    members, run = np.asarray([[0, 1]], np.int32), np.asarray([PAGE], np.int32)
    one = np.ones(2, np.int32)
    out = jax.jit(attend)(queries, pages, table, STARTS, one, members, run, sinks=sinks)
    expected = by_definition(q, *kv, SINKS, STARTS, window)
    np.testing.assert_allclose(out, expected, atol=2e-5)


@pytest.mark.parametrize("degree", [2, 4])
def test_sinks_go_with_their_heads(degree):
    """KV heads split over a mesh, and replicated."""
    heads = 8
    rng = np.random.default_rng(0)
    q, pages, sinks = float32(
        rng.standard_normal((2, 1, heads, DIM)),
        rng.standard_normal((9, 2, KV_HEADS, PAGE, DIM)),
        rng.standard_normal(heads),
    )
    rows = TABLE, STARTS, np.ones(2, np.int32)
    mesh = Mesh(np.asarray(jax.devices()[:degree]), ("tensor",))
    expected = jax.jit(functools.partial(paged_attention, backend="reference"))(
        q, pages, *rows, sinks=sinks
    )
    attend = functools.partial(paged_attention, backend="pallas_gpu_interpret", mesh=mesh)
    out = jax.jit(attend)(q, pages, *rows, sinks=sinks)
    np.testing.assert_allclose(out, expected, atol=2e-5)


def test_a_number_of_sinks_that_is_not_that_of_heads_is_an_error():
    q, pages = jnp.zeros((1, 1, HEADS, DIM)), jnp.zeros((2, 2, KV_HEADS, PAGE, DIM))
    one = jnp.ones((1, 1), jnp.int32)
    attend = functools.partial(paged_attention, q, pages, one, one[0] * 0, one[0])
    with pytest.raises(Exception, match="there must be a sink for each head, or none"):
        jax.block_until_ready(attend(sinks=jnp.zeros(HEADS + 1), backend="cpu_ffi"))
