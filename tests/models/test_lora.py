from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.errors import CheckpointError
from pshare_jax.models.attention import DenseCache, init_cache
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.decoder import bind, init_weights
from pshare_jax.models.lora import Adapters, LoraModule, check_lora, merge, stack_adapters
from pshare_jax.models.weights import LORA_TARGETS, Weights, lora_specs
from tests.helpers import on_device, stacked, tiny_config

TOLERANCE = 1e-5


def random_module(
    config: ModelConfig, rank: int, targets=LORA_TARGETS, alpha: float = 6.0, seed: int = 0
) -> LoraModule:
    rng = np.random.default_rng(seed)
    weights = {
        name: on_device(0.2 * rng.standard_normal(spec.shape))
        for name, spec in lora_specs(config, rank, targets).items()
    }
    return LoraModule(weights, alpha, rank, tuple(targets))


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def run(config: ModelConfig, weights: Weights, tokens, stacked=None, rows=None, dtype="float32"):
    """Logits and KV of one forward pass."""
    decoder = bind(config, weights)
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    io = DenseCache(config, init_cache(config, B, T, jnp.dtype(dtype)), 0)
    adapters = None if stacked is None else Adapters(stacked, rows)
    return decoder.logits(decoder.hidden(tokens, positions, io, adapters)), io.cache


def test_rows_with_different_adapters_equal_merged_weights():
    """Different ranks, targets and scales in one batch; rows without an adapter see the base."""
    config = tiny_config(architecture="qwen3")
    base = init_weights(config, seed=1)
    modules = [
        random_module(config, 4, seed=1),
        random_module(config, 2, targets=("q", "v"), alpha=2.0, seed=2),
        random_module(config, 7, targets=("o", "down", "gate"), alpha=20.0, seed=3),
    ]
    rows = [2, -1, 0, 1, 0, -1]
    tokens = jnp.asarray(np.random.default_rng(4).integers(0, 256, (len(rows), 5)), jnp.int32)

    actual, cache = run(config, base, tokens, stacked(modules), jnp.asarray(rows))

    seen = []
    for row, index in enumerate(rows):
        weights = base if index < 0 else merge(base, modules[index])
        expected, expected_cache = run(config, weights, tokens[row : row + 1])
        np.testing.assert_allclose(actual[row], expected[0], rtol=0, atol=TOLERANCE)
        for (k, v), (expected_k, expected_v) in zip(cache, expected_cache, strict=True):
            np.testing.assert_allclose(k[row], expected_k[0], rtol=0, atol=TOLERANCE)
            np.testing.assert_allclose(v[row], expected_v[0], rtol=0, atol=TOLERANCE)
        if index >= 0:
            plain, _ = run(config, base, tokens[row : row + 1])
            seen.append(np.abs(expected - plain).max())
    assert min(seen) > 0.1, "an adapter without effect would prove nothing"


@pytest.mark.parametrize("target", LORA_TARGETS)
def test_every_target_takes_part(target):
    config = tiny_config(num_layers=1)
    base = init_weights(config, seed=1)
    module = random_module(config, 3, targets=(target,), seed=5)
    tokens = jnp.asarray([[5, 6, 7], [8, 9, 10]], jnp.int32)

    adapted, _ = run(config, base, tokens, stacked([module]), jnp.asarray([0, -1]))
    merged, _ = run(config, merge(base, module), tokens)
    plain, _ = run(config, base, tokens)

    adapted, merged, plain = map(np.asarray, (adapted, merged, plain))
    np.testing.assert_allclose(adapted[0], merged[0], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(adapted[1], plain[1], rtol=0, atol=TOLERANCE)
    assert np.abs(merged[0] - plain[0]).max() > 1e-2


def test_a_broken_adapter_does_not_harm_the_base():
    config = tiny_config()
    base = init_weights(config, seed=1)
    module = random_module(config, 3, seed=5)
    broken = module._replace(weights={n: w * jnp.inf for n, w in module.weights.items()})
    tokens = jnp.asarray([[5, 6, 7], [8, 9, 10]], jnp.int32)

    adapted, _ = run(config, base, tokens, stacked([broken]), jnp.asarray([0, -1]))
    plain, _ = run(config, base, tokens)

    assert np.isnan(adapted[0]).all()
    np.testing.assert_array_equal(adapted[1], plain[1])


def test_write_kv_uses_the_adapters():
    """A LoRA module that prefills for itself writes the KV of its merged weights."""
    config = tiny_config()
    base = init_weights(config, seed=1)
    module = random_module(config, 3, seed=5)
    tokens = jnp.asarray([[5, 6, 7]], jnp.int32)
    positions = jnp.arange(3)[None]

    @jax.jit
    def write(weights, stacked):
        io = DenseCache(config, init_cache(config, 1, 3, jnp.dtype(jnp.float32)), 0)
        adapters = None if stacked is None else Adapters(stacked, jnp.zeros(1, jnp.int32))
        bind(config, weights).write_kv(tokens, positions, io, adapters)
        return io.cache

    actual = write(base, stacked([module]))
    expected = write(merge(base, module), None)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE), actual, expected
    )


def test_stack_shapes():
    config = tiny_config()
    modules = [random_module(config, 2, targets=("q",)), random_module(config, 5, targets=("o",))]
    found = stack_adapters(modules)
    # Those of the tests, which need no program.
    same = stacked(modules)
    assert set(found) == set(same)
    for name, array in found.items():
        np.testing.assert_array_equal(array, same[name], err_msg=name)

    e, h, d = config.hidden_size, config.num_heads, config.head_dim
    assert found["layers.0.attn.q.lora_a"].shape == (e, 2, 5)
    assert found["layers.0.attn.q.lora_b"].shape == (2, 5, h, d)
    assert found["layers.1.attn.o.lora_a"].shape == (h, d, 2, 5)
    assert found["layers.1.attn.o.lora_b"].shape == (2, 5, e)
    assert set(found) == set(modules[0].weights) | set(modules[1].weights)


def test_stack_keeps_bfloat16_and_merge_the_kernels_dtype():
    config = tiny_config()
    module = random_module(config, 2)
    half = module._replace(
        weights={k: on_device(v, jnp.bfloat16) for k, v in module.weights.items()}
    )
    found = stack_adapters([half])
    assert {a.dtype for a in found.values()} == {jnp.dtype(jnp.bfloat16)}
    for name, array in stacked([half]).items():
        np.testing.assert_array_equal(array, found[name], err_msg=name)
    merged = merge(init_weights(config, 1, jnp.bfloat16), half)
    assert {a.dtype for a in merged.values()} == {jnp.dtype(jnp.bfloat16)}


def test_bfloat16_adapters_stay_near_float32():
    config = tiny_config()
    base = init_weights(config, seed=1)
    module = random_module(config, 4)
    tokens = jnp.asarray([[5, 6, 7, 8]], jnp.int32)
    rows = jnp.zeros(1, jnp.int32)
    wide, _ = run(config, base, tokens, stacked([module]), rows)
    half = {name: on_device(x, jnp.bfloat16) for name, x in stacked([module]).items()}
    narrow_base = {name: on_device(x, jnp.bfloat16) for name, x in base.items()}
    narrow, _ = run(config, narrow_base, tokens, half, rows, "bfloat16")
    assert narrow.dtype == jnp.float32
    error = np.sqrt(np.mean(np.square(narrow - wide)) / np.mean(np.square(wide)))
    assert error < 0.03, error


def test_check_lora_names_the_weight():
    config = tiny_config()
    module = random_module(config, 2, targets=("q", "up"))
    check_lora(config, module)

    name = "layers.1.mlp.up.lora_b"
    missing = {k: v for k, v in module.weights.items() if k != name}
    with pytest.raises(CheckpointError, match=rf"{name}: missing"):
        check_lora(config, module._replace(weights=missing))
    with pytest.raises(CheckpointError, match=rf"{name}: shape \[9, 64\]"):
        check_lora(config, module._replace(weights=module.weights | {name: jnp.ones((9, 64))}))
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up\.lora_a: unexpected"):
        check_lora(config, module._replace(targets=("q",)))
