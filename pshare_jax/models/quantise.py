"""Weights of 8 bits: each output of a projection has one scale for its whole numbers.

Activations are not rounded: a product reads whole numbers, which every dtype of activations holds
exactly, and multiplies its result by the scales. Embeddings, norms and biases stay as they are.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pshare_jax.errors import ConfigError
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.weights import SCALE, Weights, WeightSpec, weight_specs

LARGEST = 127


def in_int8(config: ModelConfig) -> ModelConfig:
    """`config` with weights of 8 bits.

    Raises:
        ConfigError: it has layers that cannot be computed so.
    """
    if config.has_experts:
        raise ConfigError(
            f"weights: int8 is not supported for a {config.architecture} with experts; use plain"
        )
    return config.with_weights("int8")


def int8_name(fingerprint: str) -> str:
    """Names the KV that a base with weights of 8 bits writes: not that of the base itself."""
    return f"{fingerprint}/int8"


def quantise(config: ModelConfig, weights: Weights) -> Weights:
    """Some weights of a full module, those of projections as whole numbers and scales.

    Args:
        config: as `in_int8` gives it.
        weights: by name, on any device or mesh; those of other dtypes are kept.

    Returns:
        The same, laid out alike, with `.kernel` int8 and `.kernel_scale` float32.
    """
    specs = _int8_specs(config)
    quantised: Weights = {}
    for name, weight in weights.items():
        spec = specs.get(name)
        if spec is None:
            quantised[name] = weight
            continue
        outputs = len(weight_specs(config)[name + SCALE].shape)
        quantised[name], quantised[name + SCALE] = _quantise(weight, outputs)
    return quantised


@functools.lru_cache(maxsize=8)
def _int8_specs(config: ModelConfig) -> dict[str, WeightSpec]:
    return {name: spec for name, spec in weight_specs(config).items() if spec.dtype == "int8"}


@functools.partial(jax.jit, static_argnums=1)
def _quantise(weight: jax.Array, outputs: int) -> tuple[jax.Array, jax.Array]:
    wide = weight.astype(jnp.float32)
    inputs = tuple(range(wide.ndim - outputs))
    largest = jnp.max(jnp.abs(wide), axis=inputs)
    # A column of zeros has zeros for any scale.
    scale = jnp.where(largest > 0, largest, 1.0) / LARGEST
    return jnp.round(wide / scale).astype(jnp.int8), scale
