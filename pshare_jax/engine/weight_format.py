"""The form in which weights are loaded (`weights: int8` or `fp8`, or what a checkpoint has)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jax.sharding import Sharding

from pshare_jax.config import ServeConfig
from pshare_jax.convert.manifest import Manifest
from pshare_jax.convert.orbax import load_weights
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.quantise import dequantise, in_format, quantise
from pshare_jax.models.weights import Weights

LoadTensors = Callable[[Mapping[str, Sharding]], Weights]
"""Loads a checkpoint's tensors onto the given shardings."""


def served_model(config: ServeConfig, base: Manifest) -> ModelConfig:
    """The base's architecture with its weights in the form in which they are served.

    Weights of 8 bits that a checkpoint has stay what they are; where others are configured, they
    are rounded to these when they are loaded.

    Raises:
        ConfigError: it has layers that cannot be computed so.
    """
    return in_format(base.config, base.weights if config.weights == "plain" else config.weights)


def loader_of(
    manifest: Manifest, dtype: object, model: ModelConfig, *, gentle: bool = False
) -> LoadTensors:
    """Loads the tensors of a checkpoint in the form that `model` has, a group at a time.

    Factors of a LoRA module stay as they are. `gentle` is that of `load_weights`.
    """

    def in_form(loaded: Weights) -> Weights:
        plain = dequantise(model, loaded, dtype or manifest.dtype)
        return quantise(model, plain)

    convert = None if model.weight_format == "plain" else in_form
    return lambda shardings: load_weights(
        manifest, dtype=dtype, shardings=shardings, convert=convert, gentle=gentle
    )
