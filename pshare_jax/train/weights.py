"""Where the weights of a run come from: the frozen base, the teacher, the decode module's start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pshare_jax.convert.manifest import MANIFEST_FILE, Manifest, read_manifest
from pshare_jax.convert.orbax import load_weights, open_weights
from pshare_jax.convert.sources import open_source
from pshare_jax.convert.tensors import LazyTensor
from pshare_jax.errors import CheckpointError, ConfigError
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.family import uses_long_factors
from pshare_jax.models.weights import Weights, WeightSpec, lora_specs, weight_specs
from pshare_jax.sharding.rules import weight_shardings
from pshare_jax.train.loss import LoraShape


class Teacher:
    """An ordinary fine-tune: a Hugging Face folder, or a full decode module.

    Args:
        path: the folder.
        base: the base, whose vocabulary it must have.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: a checkpoint that is no full fine-tune of this base.
    """

    def __init__(self, path: str, base: Manifest):
        self._tensors: Mapping[str, LazyTensor]
        if (Path(path) / MANIFEST_FILE).is_file():
            manifest = read_manifest(path)
            certificate = manifest.certificate
            if certificate is None or certificate.kind != "full":
                raise ConfigError(
                    f"distill.teacher: {path} is no full decode module; name an ordinary fine-tune"
                )
            if base.current(certificate.prefill_fingerprint) != base.fingerprint:
                raise ConfigError(f"distill.teacher: {path} was made for another base")
            self.config = manifest.config
            self._tensors = open_weights(manifest)
        else:
            long_context = uses_long_factors(base.config)
            source = open_source(path, tokenizer=False, long_context=long_context)
            self.config, self._tensors = source.config, source.tensors
        if self.config.vocab_size != base.config.vocab_size:
            raise ConfigError(
                f"distill.teacher: {path} has {self.config.vocab_size} tokens, the base "
                f"{base.config.vocab_size}; it must be a fine-tune of the base"
            )

    def load(self, mesh: Mesh, dtype: Any) -> Weights:
        """Its weights in `dtype` on `mesh`, read one at a time."""
        shardings = weight_shardings(mesh, weight_specs(self.config))
        return {
            name: _place(np.asarray(tensor.read()).astype(dtype), shardings[name])
            for name, tensor in self._tensors.items()
        }


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
    teacher: Teacher | None,
    mesh: Mesh,
    seed: int,
) -> Weights:
    """Float32 master weights to start from: the teacher's, else the base's; LoRA factors whose
    update is zero (a random, b zero, as in arXiv 2106.09685).

    Raises:
        CheckpointError: a teacher of another architecture than the base.
    """
    if lora is None and teacher is None:
        return load_base(base, mesh, jnp.float32)
    if lora is None:
        assert teacher is not None
        _check_same(teacher.config, base.config)
        return teacher.load(mesh, np.float32)
    specs = trainable_specs(base.config, lora)
    shardings = weight_shardings(mesh, specs)
    rng = np.random.default_rng(seed)
    weights: Weights = {}
    for name, spec in specs.items():
        factor = np.zeros(spec.shape, np.float32)
        if name.endswith(".lora_a"):
            bound = np.prod(spec.shape[:-1]) ** -0.5
            factor = rng.uniform(-bound, bound, spec.shape).astype(np.float32)
        weights[name] = _place(factor, shardings[name])
    return weights


def _check_same(teacher: ModelConfig, base: ModelConfig) -> None:
    for field, value in vars(base).items():
        if field != "max_position_embeddings" and (own := getattr(teacher, field)) != value:
            raise CheckpointError(
                f"distill.teacher: its {field} is {own!r}, the base's {value!r}, so the decode "
                "module cannot start from its weights; set distill.init=base"
            )


def _place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
