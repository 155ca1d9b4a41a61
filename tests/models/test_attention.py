from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.models.attention import (
    CausalAttention,
    DenseCache,
    causal_mask,
    dense_attention,
    init_cache,
)
from tests.helpers import on_device, tiny_config

attend = jax.jit(dense_attention)


def by_definition(q, k, v, mask):
    """Attention one query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, H, D = q.shape
    group = H // k.shape[2]
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(B, T, H):
        keys = np.flatnonzero(mask[b, t])
        scores = k[b, keys, h // group] @ q[b, t, h] / math.sqrt(D)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v[b, keys, h // group]
    return out


def random_qkv(T: int, S: int, seed: int = 0):
    config = tiny_config()
    rng = np.random.default_rng(seed)
    shapes = [(2, T, config.num_heads), (2, S, config.num_kv_heads), (2, S, config.num_kv_heads)]
    return [on_device(rng.standard_normal((*s, config.head_dim))) for s in shapes]


def test_dense_attention_equals_its_definition():
    q, k, v = random_qkv(3, 7)
    rng = np.random.default_rng(1)
    mask = rng.random((2, 3, 7)) < 0.5
    mask[:, :, 2] = True
    actual = attend(q, k, v, mask)
    np.testing.assert_allclose(actual, by_definition(q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_causal_mask(window):
    masked = jax.jit(functools.partial(causal_mask, sliding_window=window))
    mask = np.asarray(masked(np.asarray([[4, 5], [0, 1]]), np.arange(7)))
    assert mask.shape == (2, 2, 7)
    for (row, t), position in {(0, 0): 4, (0, 1): 5, (1, 0): 0, (1, 1): 1}.items():
        first = 0 if window is None else max(position - window + 1, 0)
        assert np.flatnonzero(mask[row, t]).tolist() == list(range(first, position + 1))


def test_bfloat16_scores_are_accumulated_in_float32():
    q, k, v = random_qkv(4, 4)
    mask = np.tril(np.ones((4, 4), bool))
    wide = attend(q, k, v, mask)
    narrow = attend(*(on_device(x, jnp.bfloat16) for x in (q, k, v)), mask)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(narrow, np.float32), wide, atol=0.03)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("start", [4, np.asarray([4, 0])], ids=["one start", "a start each row"])
def test_dense_cache_writes_and_attends(window, start):
    """New KV lands at `start`, queries see what is there up to themselves, other slots stay."""
    config = dataclasses.replace(tiny_config(), sliding_window=window)
    length, T = 9, 3
    _, old_k, old_v = random_qkv(T, length, seed=1)
    q, k, v = random_qkv(T, T, seed=2)

    @jax.jit
    def attended(start, cache):
        io = DenseCache(config, cache, start)
        return io.attend(1, q, k, v), io.cache

    out, cache = attended(start, [(old_k, old_v)] * 2)

    want_k, want_v, mask = np.array(old_k), np.array(old_v), np.zeros((2, T, length), bool)
    for row, first in enumerate(np.broadcast_to(start, 2)):
        want_k[row, first : first + T] = k[row]
        want_v[row, first : first + T] = v[row]
        for t in range(T):
            position = first + t
            low = 0 if window is None else max(position - window + 1, 0)
            mask[row, t, low : position + 1] = True
    np.testing.assert_array_equal(cache[1][0], want_k)
    np.testing.assert_array_equal(cache[1][1], want_v)
    np.testing.assert_array_equal(cache[0][0], old_k)
    np.testing.assert_allclose(out, by_definition(q, want_k, want_v, mask), atol=1e-5)


def test_dense_cache_stores_without_attending():
    config = tiny_config()
    _, k, v = random_qkv(2, 2)
    cache = init_cache(config, batch=2, length=4, dtype=jnp.dtype(jnp.bfloat16))
    io = DenseCache(config, cache, 1)
    io.store(0, k, v)
    assert io.cache[0][0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(io.cache[0][0][:, 1:3], k.astype(jnp.bfloat16))
    np.testing.assert_array_equal(io.cache[0][1][:, 1:3], v.astype(jnp.bfloat16))
    assert not np.any(io.cache[0][0][:, [0, 3]])
    assert not np.any(cache[0][0]), "the caller's cache is not modified"


def test_dense_cache_refuses_more_tokens_than_slots():
    config = tiny_config()
    _, k, v = random_qkv(3, 3)
    io = DenseCache(config, init_cache(config, 2, 2, jnp.dtype(jnp.float32)), 0)
    with pytest.raises(ValueError, match="3 tokens do not fit a cache of 2 slots"):
        io.store(0, k, v)


def test_causal_attention_keeps_nothing():
    q, k, v = random_qkv(4, 4)
    io = CausalAttention(tiny_config(architecture="mistral", sliding_window=2))
    io.store(0, k, v)
    mask = np.tril(np.ones((2, 4, 4), bool)) & ~np.tril(np.ones((4, 4), bool), -2)
    for layer in (0, 1):
        np.testing.assert_allclose(
            io.attend(layer, q, k, v), by_definition(q, k, v, mask), atol=1e-5
        )
