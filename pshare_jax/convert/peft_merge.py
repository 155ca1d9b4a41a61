"""Adapters that are more than low-rank updates, merged with their base into a full module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np

from pshare_jax.convert.names import HfTensor, hf_tensors, write_hf
from pshare_jax.convert.peft import AdapterSource, ModuleAdapter
from pshare_jax.convert.tensors import LazyTensor
from pshare_jax.errors import CheckpointError
from pshare_jax.models.config import ModelConfig

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def merged_tensors(
    source: AdapterSource, config: ModelConfig, base: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """Every tensor of the full module by transformers' name, each merged when it is read.

    Args:
        source: the adapter.
        config: of the base.
        base: its weights by native name.

    Raises:
        CheckpointError: the adapter unties what the base ties, or acts on a part of prompts only.
    """
    if source.options.invocation is not None:
        raise CheckpointError(
            f"{source.options.path}: alora_invocation_tokens together with DoRA or weights that "
            "were trained as a whole is not supported"
        )
    saved = dict(source.saved)
    if config.tie_word_embeddings:
        _check_tied(source, saved, base)
        saved.pop(_HEAD, None)
    return {
        name: _merged(name, tensor, source.modules, saved, config, base)
        for name, tensor in hf_tensors(config).items()
    }


def _check_tied(
    source: AdapterSource, saved: Mapping[str, LazyTensor], base: Mapping[str, LazyTensor]
) -> None:
    """A base that ties its head to its embedding is a decoder with one matrix for both."""
    own = base["embed.embedding"]
    embedding, head = (
        saved[name].read().astype(own.dtype) if name in saved else own.read()
        for name in (_EMBEDDING, _HEAD)
    )
    if not np.array_equal(embedding, head):
        raise CheckpointError(
            f"{source.folder}: gives the output head other values than the embedding, but the base "
            "ties the two; import the base with --untie-head"
        )


def _merged(
    name: str,
    tensor: HfTensor,
    modules: Mapping[str, ModuleAdapter],
    saved: Mapping[str, LazyTensor],
    config: ModelConfig,
    base: Mapping[str, LazyTensor],
) -> LazyTensor:
    dtype = base[tensor.parts[0].native].dtype
    own = saved.get(name)

    def read_base() -> np.ndarray:
        if own is not None:
            return own.read().astype(dtype)
        return write_hf(name, config, lambda native: base[native].read())

    adapter = modules.get(name.removesuffix(".weight"))
    read: Callable[[], np.ndarray] = read_base
    if adapter is not None:
        read = functools.partial(_adapted, read_base, adapter, dtype)
    return LazyTensor(tensor.shape, dtype, read)


def _adapted(
    read_base: Callable[[], np.ndarray], adapter: ModuleAdapter, dtype: np.dtype
) -> np.ndarray:
    """A weight with its update; DoRA (arXiv 2402.09353) then gives its rows their norms."""
    a, b = (factor.read().astype(np.float32) for factor in (adapter.a, adapter.b))
    weight = read_base().astype(np.float32) + np.float32(adapter.scale) * (b @ a)
    if adapter.magnitude is not None:
        norms = np.linalg.norm(weight, axis=1)
        weight *= (adapter.magnitude.read().astype(np.float32) / norms)[:, None]
    return weight.astype(dtype)
