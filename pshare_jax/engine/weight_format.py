"""The form in which weights are loaded (`weights: int8`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from jax.sharding import Sharding

from pshare_jax.convert.manifest import Manifest
from pshare_jax.convert.orbax import load_weights
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
