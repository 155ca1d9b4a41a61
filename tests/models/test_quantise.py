"""Weights of 8 bits: what is rounded, by how much, and what a decoder makes of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.errors import ConfigError
from pshare_jax.models.attention import CausalAttention
from pshare_jax.models.decoder import bind, init_weights
from pshare_jax.models.lora import LoraModule, merge
from pshare_jax.models.packed import unsupported
from pshare_jax.models.quantise import in_format, kv_name, quantise
from pshare_jax.models.weights import Weights, check_weights, lora_specs, weight_specs
from pshare_jax.sharding.rules import weight_shardings
from tests.helpers import on_device, tiny_config

PLAIN = tiny_config(architecture="qwen2", tie_word_embeddings=False)
CONFIG = in_format(PLAIN, "int8")
WEIGHTS = init_weights(PLAIN, seed=0)


def dequantised(weights: Weights) -> Weights:
    """Plain weights of the same values."""
    plain: Weights = {}
    for name, weight in weights.items():
        if name.endswith("_scale"):
            continue
        scale = weights.get(f"{name}_scale")
        # By NumPy: each shape would be compiled.
        plain[name] = (
            weight
            if scale is None
            else on_device(np.asarray(weight, np.float32) * np.asarray(scale))
        )
    return plain


@functools.partial(jax.jit, static_argnums=0)
def logits(config, weights) -> jax.Array:
    tokens = jnp.asarray([[1, 5, 9, 200, 17]])
    decoder = bind(config, weights)
    hidden = decoder.hidden(tokens, jnp.arange(5)[None], CausalAttention(config))
    return decoder.logits(hidden)


def test_projections_alone_are_whole_numbers():
    weights = quantise(CONFIG, WEIGHTS)
    check_weights(CONFIG, weights)
    for name, spec in weight_specs(CONFIG).items():
        is_kernel = name.endswith(".kernel")
        assert spec.dtype == ("int8" if is_kernel else "float32" if "_scale" in name else None)
        assert weights[name].dtype == (jnp.int8 if is_kernel else jnp.float32)
    same = [name for name in WEIGHTS if not name.endswith(".kernel")]
    assert "embed.embedding" in same
    assert all(weights[name] is WEIGHTS[name] for name in same)
    assert weights["layers.0.attn.o.kernel_scale"].shape == (PLAIN.hidden_size,)
    assert weights["layers.0.attn.q.kernel_scale"].shape == (PLAIN.num_heads, PLAIN.head_dim)
    assert weights["lm_head.kernel_scale"].shape == (PLAIN.vocab_size,)


def test_each_value_is_off_by_half_a_step_at_most():
    kernel = WEIGHTS["layers.1.mlp.up.kernel"].at[:, 3].set(0.0)
    weights = quantise(CONFIG, {"layers.1.mlp.up.kernel": kernel})
    scale = weights["layers.1.mlp.up.kernel_scale"]
    np.testing.assert_allclose(jnp.abs(kernel).max(axis=0)[:3] / 127, scale[:3], rtol=1e-6)
    found = dequantised(weights)["layers.1.mlp.up.kernel"]
    assert np.all(np.abs(found - kernel) <= 0.5001 * scale)
    assert np.abs(weights["layers.1.mlp.up.kernel"]).max() == 127
    np.testing.assert_array_equal(found[:, 3], 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_the_values(dtype):
    plain = {name: weight.astype(dtype) for name, weight in WEIGHTS.items()}
    weights = quantise(CONFIG, plain)
    values = {name: value.astype(dtype) for name, value in dequantised(weights).items()}
    # Of bfloat16 the values are rounded once more, which the whole numbers are not.
    tolerance = 1e-5 if dtype == "float32" else 0.1
    np.testing.assert_allclose(logits(CONFIG, weights), logits(PLAIN, values), atol=tolerance)
    off = np.abs(logits(CONFIG, weights) - logits(PLAIN, plain)).max()
    assert 1e-4 < off < 0.2


@pytest.mark.parametrize("tied", [False, True])
def test_rounded_activations_are_near_and_split_like_others(tied):
    """On a mesh of two each device has its part of the groups."""
    plain = tiny_config(architecture="qwen2", tie_word_embeddings=tied)
    config, weights = in_format(plain, "int8-dynamic"), init_weights(plain, seed=0)
    rounded = quantise(config, weights)
    check_weights(config, rounded)
    assert (rounded["embed.embedding"].dtype == jnp.int8) is tied
    found = logits(config, rounded)
    weight_only = in_format(plain, "int8")
    without = logits(weight_only, quantise(weight_only, weights))
    assert 1e-3 < np.abs(found - without).max() < 0.15
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("tensor",))
    split = jax.device_put(rounded, weight_shardings(mesh, weight_specs(config)))
    np.testing.assert_allclose(logits(config, split), found, atol=2e-2)


def test_the_shards_of_a_mesh_are_those_of_one_device():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("tensor",))
    axes = jax.sharding.PartitionSpec(None, "tensor")
    name = "layers.0.mlp.gate.kernel"
    split = jax.device_put(WEIGHTS[name], jax.sharding.NamedSharding(mesh, axes))
    ours, one = (quantise(CONFIG, {name: weight}) for weight in (split, WEIGHTS[name]))
    for part in (name, f"{name}_scale"):
        np.testing.assert_array_equal(ours[part], one[part])


def test_experts_are_refused_by_name():
    with pytest.raises(ConfigError, match="int8 is not supported for a mixtral with experts"):
        in_format(tiny_config(architecture="mixtral"), "int8")


def test_nothing_is_merged_into_whole_numbers():
    factors = {n: jnp.ones(s.shape) for n, s in lora_specs(PLAIN, 2, ("q",)).items()}
    with pytest.raises(ValueError, match="merge before it is quantised"):
        merge(quantise(CONFIG, WEIGHTS), LoraModule(factors, 1.0, 2, ("q",)))


def test_they_have_a_name_of_their_own_and_layers_in_cpp():
    names = [kv_name("abc", form) for form in ("plain", "int8", "int8-dynamic")]
    assert names == ["abc", "abc/int8", "abc/int8-dynamic"]
    assert unsupported(CONFIG) is None
    assert CONFIG.with_weights("plain") == PLAIN
