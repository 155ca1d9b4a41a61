"""Where the weights of a run come from: the frozen base, and the decode module's start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pshare_jax.convert.manifest import Manifest
from pshare_jax.convert.orbax import load_weights
from pshare_jax.convert.tensors import LazyTensor
from pshare_jax.errors import CheckpointError, ConfigError
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.weights import Weights, WeightSpec, lora_specs, weight_specs
from pshare_jax.sharding.rules import weight_shardings
from pshare_jax.train.fine_tune import FineTune, place
from pshare_jax.train.loss import LoraShape


def load_base(base: Manifest, mesh: Mesh, dtype: Any) -> Weights:
    """The base's weights in `dtype` on `mesh`."""
    return load_weights(
        base, dtype=dtype, shardings=weight_shardings(mesh, weight_specs(base.config))
    )


def trainable_specs(config: ModelConfig, lora: LoraShape | None) -> dict[str, WeightSpec]:
    """What is trained: all weights, or the factors of a LoRA module."""
    return weight_specs(config) if lora is None else lora_specs(config, lora.rank, lora.targets)


def initial_weights(
    base: Manifest,
    lora: LoraShape | None,
    start: FineTune | None,
    mesh: Mesh,
    seed: int,
) -> Weights:
    """Float32 master weights to start from.

    Args:
        base: the prefill checkpoint.
        lora: the LoRA module that is trained, or None for all weights.
        start: where they come from. Without, they are the base's, or LoRA factors whose update is
            zero (a random, b zero, as in arXiv 2106.09685).
        mesh: where they lie.
        seed: of the random factors.

    Raises:
        ConfigError: `start` is a LoRA of another shape than is trained, or none.
        CheckpointError: `start` has another architecture than the base.
    """
    specs = trainable_specs(base.config, lora)
    shardings = weight_shardings(mesh, specs)
    if lora is None:
        if start is None:
            return load_base(base, mesh, jnp.float32)
        _check_same(start, base.config)
        return start.load(mesh, np.float32)
    if start is not None:
        tensors = _same_factors(start, lora)
        return {n: place(np.asarray(tensors[n].read(), np.float32), shardings[n]) for n in specs}
    rng = np.random.default_rng(seed)
    weights: Weights = {}
    for name, spec in specs.items():
        factor = np.zeros(spec.shape, np.float32)
        if name.endswith(".lora_a"):
            bound = np.prod(spec.shape[:-1]) ** -0.5
            factor = rng.uniform(-bound, bound, spec.shape).astype(np.float32)
        weights[name] = place(factor, shardings[name])
    return weights


def _same_factors(start: FineTune, lora: LoraShape) -> Mapping[str, LazyTensor]:
    found = start.lora
    if found is None:
        raise ConfigError(
            f"{start.key}: {start.path} has all weights, but lora.rank is {lora.rank}; set "
            "lora.rank=0, or name a LoRA"
        )
    for key, value, own in (
        ("lora.rank", lora.rank, found.rank),
        ("lora.alpha", lora.alpha, found.alpha),
        ("lora.targets", sorted(lora.targets), sorted(found.targets)),
    ):
        if value != own:
            raise ConfigError(
                f"{start.key}: {start.path} has {key} {own}, not {value}; train with its own"
            )
    return found.tensors


def _check_same(start: FineTune, base: ModelConfig) -> None:
    for field, value in vars(base).items():
        if field != "max_position_embeddings" and (own := getattr(start.config, field)) != value:
            raise CheckpointError(
                f"{start.key}: its {field} is {own!r}, the base's {value!r}, so the decode "
                "module cannot start from its weights; "
                + ("set distill.init=base" if start.key == "distill.teacher" else "leave init out")
            )
