"""Weights of 8 bits: each output of a projection has one scale for its whole numbers.

`int8` does not round activations: a product reads whole numbers, which every dtype of activations
holds exactly, and multiplies its result by the scales. Embeddings, norms and biases stay as they
are. `int8-dynamic` rounds what enters a product too (`kernels/matmul/rounded.py`), and has a tied
embedding in 8 bits, with a scale for each token.
"""

from __future__ import annotations

import functools

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
        weights: by name, on any device or mesh; those of other dtypes are kept.

    Returns:
        The same, laid out alike, with `.kernel` int8 and `.kernel_scale` float32, an embedding
        likewise if `config` wants that.
    """
    specs = _int8_specs(config)
    quantised: Weights = {}
    for name, weight in weights.items():
        spec = specs.get(name)
        if spec is None:
            quantised[name] = weight
            continue
        outputs = len(weight_specs(config)[name + SCALE].shape)
        by_token = spec.axes[0] == "vocab"
        inputs = range(outputs, weight.ndim) if by_token else range(weight.ndim - outputs)
        quantised[name], quantised[name + SCALE] = _quantise(weight, tuple(inputs))
    return quantised


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
