"""Weights of 8 bits: each output of a projection has one scale for its numbers.

`int8` and `fp8` do not round activations: a product reads whole numbers, or FP8 ones (e4m3), which
every dtype of activations holds exactly, and multiplies its result by the scales. Embeddings, norms
and biases stay as they are; in `int8-layers` and `fp8-layers`, which checkpoints may have, an
output head too. `int8-dynamic` rounds what enters a product too (`kernels/matmul/rounded.py`), and
has a tied embedding in 8 bits, with a scale for each token.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pshare_jax.errors import ConfigError
from pshare_jax.models.config import ModelConfig, WeightFormat
from pshare_jax.models.weights import SCALE, Weights, narrow_specs, weight_specs

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""What the largest weight of an output becomes, by dtype."""


def in_format(config: ModelConfig, form: WeightFormat) -> ModelConfig:
    """`config` with weights in another form.

    Raises:
        ConfigError: it has layers that cannot be computed so.
    """
    if form != "plain" and config.has_experts:
        raise ConfigError(
            f"weights: {form} is not supported for a {config.architecture} with experts; use plain"
        )
    return config.with_weights(form)


def kv_name(fingerprint: str, form: WeightFormat) -> str:
    """Names the KV that a base writes with its weights in a form: each is another."""
    return fingerprint if form == "plain" else f"{fingerprint}/{form}"


def quantise(config: ModelConfig, weights: Weights) -> Weights:
    """Some weights of a full module, those of projections as numbers of 8 bits and scales.

    Args:
        config: as `in_format` gives it.
        weights: by name, on any device or mesh. Others than projections are kept, and so is what
            has the form already, with its scales.

    Returns:
        The same, laid out alike, with `.kernel` of the form's dtype and `.kernel_scale` float32, an
        embedding likewise if `config` wants that. An output with a weight that is not finite has a
        scale that is not; one of weights whose scale would be less than 1.2e-38 has zeros.
    """
    specs = narrow_specs(config)
    quantised: Weights = {}
    for name, weight in weights.items():
        spec = specs.get(name)
        if spec is None or weight.dtype == spec.dtype:
            quantised[name] = weight
            continue
        outputs = len(weight_specs(config)[name + SCALE].shape)
        by_token = spec.axes[0] == "vocab"
        inputs = range(outputs, weight.ndim) if by_token else range(weight.ndim - outputs)
        assert spec.dtype is not None
        quantised[name], quantised[name + SCALE] = _quantise(weight, tuple(inputs), spec.dtype)
    return quantised


def dequantise(config: ModelConfig, weights: Weights, dtype: Any) -> Weights:
    """Some weights of a full module, numbers of 8 bits that `config` has otherwise as floats.

    Args:
        config: the decoder's, in any form.
        weights: by name; numbers of 8 bits are beside their scales.
        dtype: of what they stand for; float32 where `config` has other numbers of 8 bits in their
            place, to which they are to be rounded.

    Returns:
        The same; those scales are left out.
    """
    kept = narrow_specs(config)

    def stays(name: str) -> bool:
        return name in kept and weights[name].dtype == kept[name].dtype

    plain: Weights = {}
    for name, weight in weights.items():
        kernel = name.removesuffix(SCALE)
        if kernel != name and not stays(kernel):
            continue
        if weight.dtype.itemsize == 1 and not stays(name):
            wanted = jnp.float32 if name in kept else dtype
            weight = _stood_for(weight, weights[name + SCALE], jnp.dtype(wanted))
        plain[name] = weight
    return plain


@functools.partial(jax.jit, static_argnums=2)
def _stood_for(kernel: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return (kernel.astype(jnp.float32) * scale).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantise(
    weight: jax.Array, inputs: tuple[int, ...], dtype: str
) -> tuple[jax.Array, jax.Array]:
    wide = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=inputs, keepdims=True)
    # An output of zeros has zeros for any scale; so has one whose own scale would not be a normal
    # number, which processors may take for zero: FP8 would become NaN.
    least = LARGEST[dtype] * float(jnp.finfo(jnp.float32).tiny)
    scale = jnp.where(largest < least, 1.0, largest) / LARGEST[dtype]
    numbers = wide / scale
    if jnp.issubdtype(dtype, jnp.integer):
        numbers = jnp.round(numbers)
    return numbers.astype(dtype), jnp.squeeze(scale, inputs)
