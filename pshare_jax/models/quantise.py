"""Weights of 8 bits: each output of a projection has one scale for its whole numbers.

`int8` does not round activations: a product reads whole numbers, which every dtype of activations
holds exactly, and multiplies its result by the scales. Embeddings, norms and biases stay as they
are; in `int8-layers`, which checkpoints may have, an output head too. `int8-dynamic` rounds what
enters a product too (`kernels/matmul/rounded.py`), and has a tied embedding in 8 bits, with a scale
for each token.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pshare_jax.errors import ConfigError
from pshare_jax.models.config import ModelConfig, WeightFormat
from pshare_jax.models.weights import SCALE, Weights, WeightSpec, weight_specs

LARGEST = 127


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
    """Some weights of a full module, those of projections as whole numbers and scales.

    Args:
        config: as `in_format` gives it.
        weights: by name, on any device or mesh. Others than projections are kept, and so are whole
            numbers with their scales.

    Returns:
        The same, laid out alike, with `.kernel` int8 and `.kernel_scale` float32, an embedding
        likewise if `config` wants that.
    """
    specs = _int8_specs(config)
    quantised: Weights = {}
    for name, weight in weights.items():
        spec = specs.get(name)
        if spec is None or weight.dtype == jnp.int8:
            quantised[name] = weight
            continue
        outputs = len(weight_specs(config)[name + SCALE].shape)
        by_token = spec.axes[0] == "vocab"
        inputs = range(outputs, weight.ndim) if by_token else range(weight.ndim - outputs)
        quantised[name], quantised[name + SCALE] = _quantise(weight, tuple(inputs))
    return quantised


def dequantise(config: ModelConfig, weights: Weights, dtype: Any) -> Weights:
    """Some weights of a full module, whole numbers that `config` has otherwise as `dtype`.

    Args:
        config: the decoder's, in any form.
        weights: by name; whole numbers are beside their scales.
        dtype: of what they stand for.

    Returns:
        The same; those scales are left out.
    """
    kept = _int8_specs(config)
    plain: Weights = {}
    for name, weight in weights.items():
        kernel = name.removesuffix(SCALE)
        if kernel != name and kernel not in kept:
            continue
        if weight.dtype == jnp.int8 and name not in kept:
            weight = _stood_for(weight, weights[name + SCALE], jnp.dtype(dtype))
        plain[name] = weight
    return plain


@functools.partial(jax.jit, static_argnums=2)
def _stood_for(kernel: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return (kernel.astype(jnp.float32) * scale).astype(dtype)


@functools.lru_cache(maxsize=8)
def _int8_specs(config: ModelConfig) -> dict[str, WeightSpec]:
    return {name: spec for name, spec in weight_specs(config).items() if spec.dtype == "int8"}


@functools.partial(jax.jit, static_argnums=1)
def _quantise(weight: jax.Array, inputs: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    wide = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=inputs, keepdims=True)
    # An output of zeros has zeros for any scale.
    scale = jnp.where(largest > 0, largest, 1.0) / LARGEST
    return jnp.round(wide / scale).astype(jnp.int8), jnp.squeeze(scale, inputs)
