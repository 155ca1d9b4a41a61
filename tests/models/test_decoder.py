from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pshare_jax.errors import CheckpointError
from pshare_jax.models.attention import CausalAttention, DenseCache, init_cache
from pshare_jax.models.decoder import (
    Decoder,
    bind,
    init_weights,
    looped_rope_tables,
    rope_tables,
)
from pshare_jax.models.weights import weight_specs
from tests.helpers import ARCHITECTURES, FAMILIES, on_device, tiny_config
from tests.pairwise import some


def positions_of(tokens: jax.Array, start: int = 0) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(start, start + tokens.shape[1]), tokens.shape)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, weights, tokens):
    """Hidden states and logits of one pass."""
    decoder = bind(config, weights)
    hidden = decoder.hidden(tokens, positions_of(tokens), CausalAttention(config))
    return hidden, decoder.logits(hidden)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_parameter_paths_are_the_weight_names(architecture):
    config = tiny_config(architecture=architecture)
    weights = init_weights(config, seed=0)
    for decoder in (Decoder(config, weights), bind(config, weights)):
        state = {
            ".".join(map(str, path)): leaf[...]
            for path, leaf in nnx.to_flat_state(nnx.state(decoder))
        }
        assert set(state) == set(weight_specs(config))
        assert all(state[name] is weights[name] for name in state)


def test_bind_works_on_tracers_and_on_other_threads_weights():
    """The cached structure holds no array: binding again sees the new weights."""
    config = tiny_config()
    tokens = jnp.asarray([[3, 4, 5]], jnp.int32)

    def logits(seed):
        return forward(config, init_weights(config, seed), tokens)[1]

    first, second = logits(0), logits(1)
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_array_equal(first, logits(0))


@pytest.mark.parametrize("architecture", some(ARCHITECTURES, ["mistral", "qwen3"]))
def test_steps_over_a_cache_equal_one_pass(architecture):
    """Chunk by chunk and token by token over a cache: the logits of a single pass."""
    config = tiny_config(architecture=architecture)
    weights = init_weights(config, seed=0)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 9)), jnp.int32)

    @jax.jit
    def in_parts(weights):
        decoder = bind(config, weights)
        cache = init_cache(config, 2, 9, jnp.dtype(jnp.float32))
        parts = []
        for first, last in ((0, 4), (4, 7), (7, 8), (8, 9)):
            io = DenseCache(config, cache, first)
            part = tokens[:, first:last]
            parts.append(decoder.hidden(part, positions_of(part, first), io))
            cache = io.cache
        return decoder.logits(jnp.concatenate(parts, axis=1))

    _, whole = forward(config, weights, tokens)
    np.testing.assert_allclose(in_parts(weights), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", some(ARCHITECTURES, ["llama", "qwen2"]))
def test_write_kv_leaves_the_kv_of_a_forward_pass(architecture):
    config = tiny_config(architecture=architecture)
    weights = init_weights(config, seed=0)
    tokens = jnp.asarray([[3, 4, 5, 6, 7, 8]], jnp.int32)

    def written(method: str):
        @jax.jit
        def run(weights):
            io = DenseCache(config, init_cache(config, 1, 6, jnp.dtype(jnp.float32)), 0)
            getattr(bind(config, weights), method)(tokens, positions_of(tokens), io)
            return io.cache

        return run(weights)

    cache = written("write_kv")
    assert all(np.abs(k).max() > 0 and np.abs(v).max() > 0 for k, v in cache)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), cache, written("hidden")
    )


def test_write_kv_leaves_out_what_the_kv_does_not_need():
    """The last layer's query, output and feed-forward weights and the head are never read."""
    config = tiny_config()
    weights = init_weights(config, seed=0)
    for name in weights:
        unread = (".attn.q.", ".attn.o.", ".mlp.", ".mlp_norm.")
        if name.startswith(("final_norm", "lm_head")) or (
            name.startswith("layers.1.") and any(part in name for part in unread)
        ):
            weights[name] = on_device(np.full(weights[name].shape, np.nan))
    tokens = jnp.asarray([[3, 4, 5]], jnp.int32)

    @jax.jit
    def written(weights):
        io = DenseCache(config, init_cache(config, 1, 3, jnp.dtype(jnp.float32)), 0)
        bind(config, weights).write_kv(tokens, positions_of(tokens), io)
        return io.cache

    assert all(np.isfinite(k).all() and np.isfinite(v).all() for k, v in written(weights))


@pytest.mark.parametrize("architecture", some(ARCHITECTURES, ["qwen2", "qwen3"]))
def test_bfloat16_stays_near_float32(architecture):
    config = tiny_config(architecture=architecture)
    weights = init_weights(config, seed=0)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 9)), jnp.int32)

    _, wide = forward(config, weights, tokens)
    narrow_weights = {name: on_device(x, jnp.bfloat16) for name, x in weights.items()}
    hidden, narrow = forward(config, narrow_weights, tokens)
    assert hidden.dtype == jnp.bfloat16
    assert narrow.dtype == jnp.float32
    error = np.sqrt(np.mean(np.square(narrow - wide)) / np.mean(np.square(wide)))
    assert error < 0.03, error


def test_bind_names_the_weight_that_does_not_fit():
    config = tiny_config()
    weights = init_weights(config, seed=0)
    name = "layers.1.mlp.up.kernel"

    missing = {k: v for k, v in weights.items() if k != name}
    with pytest.raises(CheckpointError, match=rf"{name}: missing"):
        bind(config, missing)
    with pytest.raises(CheckpointError, match=r"layers\.2\.attn\.q\.kernel: unexpected"):
        bind(config, weights | {"layers.2.attn.q.kernel": weights["layers.1.attn.q.kernel"]})
    with pytest.raises(CheckpointError, match=rf"{name}: shape \[64, 48\].*\[48, 64\]"):
        bind(config, weights | {name: weights[name].T})


def test_init_weights_is_reproducible_and_of_the_dtype_asked_for():
    config = tiny_config(architecture="qwen2")
    weights = init_weights(config, seed=3, dtype=jnp.dtype(jnp.bfloat16))
    again = init_weights(config, seed=3, dtype=jnp.dtype(jnp.bfloat16))
    assert {x.dtype for x in weights.values()} == {jnp.dtype(jnp.bfloat16)}
    assert all(np.array_equal(weights[name], again[name]) for name in weights)
    other = init_weights(config, seed=4)
    assert not np.array_equal(weights["embed.embedding"], other["embed.embedding"])


def test_rope_tables_of_a_loop_are_the_tables():
    """Of a family whose layers rotate in two ways."""
    config = tiny_config(architecture="gemma3")
    positions = jnp.asarray([[0, 1, 2], [40, 7, 300]])
    tables, looped = rope_tables(config, positions), looped_rope_tables(config, positions)
    assert len(tables) == 2
    assert list(looped) == list(tables)
    for rope, table in tables.items():
        for ours, other in zip(looped[rope], table, strict=True):
            np.testing.assert_allclose(ours, other, atol=1e-6)
