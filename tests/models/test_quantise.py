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
DTYPES = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}
CONFIGS = {form: in_format(PLAIN, form) for form in DTYPES}
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


@pytest.mark.parametrize("form", DTYPES)
def test_projections_alone_have_8_bits(form):
    config, dtype = CONFIGS[form], DTYPES[form]
    weights = quantise(config, WEIGHTS)
    check_weights(config, weights)
    for name, spec in weight_specs(config).items():
        is_kernel = name.endswith(".kernel")
        assert spec.dtype == (dtype.name if is_kernel else "float32" if "_scale" in name else None)
        assert weights[name].dtype == (dtype if is_kernel else jnp.float32)
    same = [name for name in WEIGHTS if not name.endswith(".kernel")]
    assert "embed.embedding" in same
    assert all(weights[name] is WEIGHTS[name] for name in same)
    assert weights["layers.0.attn.o.kernel_scale"].shape == (PLAIN.hidden_size,)
    assert weights["layers.0.attn.q.kernel_scale"].shape == (PLAIN.num_heads, PLAIN.head_dim)
    assert weights["lm_head.kernel_scale"].shape == (PLAIN.vocab_size,)


NAME = "layers.1.mlp.up.kernel"


@pytest.mark.parametrize(("form", "largest"), [("int8", 127), ("fp8", 448)])
def test_each_value_is_the_nearest_that_there_is(form, largest):
    kernel = WEIGHTS[NAME].at[:, 3].set(0.0)
    weights = quantise(CONFIGS[form], {NAME: kernel})
    scale = weights[f"{NAME}_scale"]
    np.testing.assert_allclose(jnp.abs(kernel).max(axis=0)[:3] / largest, scale[:3], rtol=1e-6)
    numbers = np.asarray(weights[NAME]).astype(np.float32)
    assert np.abs(numbers).max() == largest
    np.testing.assert_array_equal(numbers[:, 3], 0)
    all_ = np.arange(256, dtype=np.uint8).view(DTYPES[form]).astype(np.float32)
    nearest = np.nanmin(np.abs(np.asarray(kernel / scale)[..., None] - all_), axis=-1)
    off = np.abs(np.asarray(kernel / scale) - numbers)
    np.testing.assert_allclose(off, nearest, atol=1e-6 * largest)


@pytest.mark.parametrize("form", DTYPES)
def test_an_output_whose_scale_would_be_no_normal_number_is_zero(form):
    outputs = [1e-44, 1e-38, 1e-37, 1e-35, 1e-30]
    kernel = WEIGHTS[NAME].at[:, :5].set(jnp.asarray([outputs, [0.0] * 5] * 24))
    weights = quantise(CONFIGS[form], {NAME: kernel})
    numbers, scale = (np.asarray(w).astype(np.float32) for w in weights.values())
    values = (numbers.astype(np.float64) * scale)[0, :5]
    np.testing.assert_allclose(values, [0, 0, 0, 1e-35, 1e-30], rtol=1e-6)
    assert np.isfinite(numbers).all()
    assert scale.min() >= np.finfo(np.float32).tiny


@pytest.mark.parametrize("form", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_shows_in_its_output_alone(form, value):
    weights = quantise(CONFIGS[form], {NAME: WEIGHTS[NAME].at[5, 2].set(value)})
    clean = quantise(CONFIGS[form], {NAME: WEIGHTS[NAME]})
    scale = np.asarray(weights[f"{NAME}_scale"])
    assert list(np.flatnonzero(~np.isfinite(scale))) == [2]
    for name, whole in clean.items():
        ours, theirs = (np.asarray(a).astype(np.float32) for a in (weights[name], whole))
        np.testing.assert_array_equal(np.delete(ours, 2, -1), np.delete(theirs, 2, -1))


@pytest.mark.parametrize("form", DTYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_the_values(dtype, form):
    config = CONFIGS[form]
    plain = {name: on_device(weight, dtype) for name, weight in WEIGHTS.items()}
    weights = quantise(config, plain)
    values = {name: on_device(value, dtype) for name, value in dequantised(weights).items()}
    # Of bfloat16 the values are rounded once more, which the numbers of 8 bits are not.
    tolerance = 1e-5 if dtype == "float32" else 0.1
    found = logits(config, weights)
    np.testing.assert_allclose(found, logits(PLAIN, values), atol=tolerance)
    off = np.abs(found - logits(PLAIN, plain)).max()
    assert 1e-4 < off < 0.4


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


@pytest.mark.parametrize("form", DTYPES)
def test_the_shards_of_a_mesh_are_those_of_one_device(form):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("tensor",))
    axes = jax.sharding.PartitionSpec(None, "tensor")
    name = "layers.0.mlp.gate.kernel"
    split = jax.device_put(WEIGHTS[name], jax.sharding.NamedSharding(mesh, axes))
    ours, one = (quantise(CONFIGS[form], {name: weight}) for weight in (split, WEIGHTS[name]))
    for part in (name, f"{name}_scale"):
        np.testing.assert_array_equal(ours[part], one[part])


@pytest.mark.parametrize("form", DTYPES)
def test_experts_are_refused_by_name(form):
    with pytest.raises(ConfigError, match=f"{form} is not supported for a mixtral with experts"):
        in_format(tiny_config(architecture="mixtral"), form)


@pytest.mark.parametrize("form", DTYPES)
def test_nothing_is_merged_into_8_bits(form):
    factors = {n: jnp.ones(s.shape) for n, s in lora_specs(PLAIN, 2, ("q",)).items()}
    with pytest.raises(ValueError, match="has 8 bits; merge before it is quantised"):
        merge(quantise(CONFIGS[form], WEIGHTS), LoraModule(factors, 1.0, 2, ("q",)))


def test_they_have_a_name_of_their_own_and_layers_in_cpp():
    names = [kv_name("abc", form) for form in ("plain", "int8", "int8-dynamic", "fp8")]
    assert names == ["abc", "abc/int8", "abc/int8-dynamic", "abc/fp8"]
    for config in CONFIGS.values():
        assert unsupported(config) is None
        assert config.with_weights("plain") == PLAIN
