"""The form in which weights are loaded (`weights: int8`): how, and what has no such form."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from jax.sharding import Sharding

from pshare_jax.config import ModelEntry
from pshare_jax.convert.manifest import Manifest
from pshare_jax.convert.orbax import load_weights
from pshare_jax.core.models import ModelKind
from pshare_jax.errors import ConfigError
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.quantise import quantise
from pshare_jax.models.weights import Weights

LoadTensors = Callable[[Mapping[str, Sharding]], Weights]
"""Loads a checkpoint's tensors onto the given shardings."""


def loader_of(
    manifest: Manifest, dtype: object, model: ModelConfig, *, gentle: bool = False
) -> LoadTensors:
    """Loads the tensors of a checkpoint in the form that `model` has, a group at a time.

    Factors of a LoRA module stay as they are. `gentle` is that of `load_weights`.
    """
    convert = None if model.weight_format == "plain" else functools.partial(quantise, model)
    return lambda shardings: load_weights(
        manifest, dtype=dtype, shardings=shardings, convert=convert, gentle=gentle
    )


def check_form(entry: ModelEntry, kind: ModelKind, model: ModelConfig) -> None:
    """Refuses what prefills with weights that a LoRA module is merged into, if they are not plain.

    Raises:
        ConfigError: names the model.
    """
    if kind == "lora" and entry.sharing == "isolated" and model.weight_format != "plain":
        raise ConfigError(
            f"models.{entry.name}: a LoRA module that is isolated prefills with weights that it is "
            "merged into, which `weights: int8` has not; use plain"
        )
