"""Hugging Face tensors <-> native weights: names by the model's family, one rule for layouts.

The Hugging Face side stores a linear layer as `[out, in]` with heads flattened into one axis;
the native side stores `[*in, *out]` with heads apart (see `pshare_jax.models.weights`). LoRA
factors follow PEFT: `lora_A.weight [rank, in]` and `lora_B.weight [out, rank]`, their names
without PEFT's `base_model.model.` in front.

Most tensors are one weight. A fused one holds several, one after another along its first axis; a
weight with an axis of experts comes from one tensor for each of them, or from a stacked one that
holds all experts of several weights, whose last axes alternate.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pshare_jax.errors import CheckpointError
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.registry import family
from pshare_jax.models.weights import WeightSpec, lora_specs, lora_targets, weight_specs

PEFT_PREFIX = "base_model.model."

_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_NATIVE_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_LORA = {".lora_a": ".lora_A.weight", ".lora_b": ".lora_B.weight"}


@dataclass(frozen=True)
class Part:
    """What a Hugging Face tensor holds of a native weight: all of it, or one expert's part."""

    native: str
    expert: int | None = None


@dataclass(frozen=True)
class HfTensor:
    """A Hugging Face tensor: its shape, and the parts that lie along its first axis, or of a
    stacked one along its last, in turn."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    stacked: bool = False


@functools.lru_cache(maxsize=8)
def _specs(config: ModelConfig) -> dict[str, WeightSpec]:
    return weight_specs(config) | lora_specs(config, rank=1, targets=lora_targets(config))


@functools.lru_cache(maxsize=8)
def hf_tensors(config: ModelConfig) -> dict[str, HfTensor]:
    """Every tensor of a full model by Hugging Face name, in checkpoint order."""
    known = family(config.architecture)
    fused = {native: hf for hf, natives in known.hf_fused.items() for native in natives}
    stacked = {native: hf for hf, natives in known.hf_stacked.items() for native in natives}
    tensors: dict[str, HfTensor] = {}
    for native, spec in weight_specs(config).items():
        match = _NATIVE_LAYER.fullmatch(native)
        prefix, suffix = (f"model.layers.{match[1]}.", match[2]) if match else ("", native)
        if suffix in stacked:
            name = prefix + stacked[suffix]
            parts = (*tensors[name].parts, Part(native)) if name in tensors else (Part(native),)
            shape = (*spec.shape[:-1], spec.shape[-1] * len(parts))
            tensors[name] = HfTensor(shape, parts, stacked=True)
            continue
        if (pattern := known.hf_experts.get(suffix)) is not None:
            for expert in range(spec.shape[0]):
                name = prefix + pattern.format(expert=expert)
                tensors[name] = HfTensor(hf_shape(native, config), (Part(native, expert),))
            continue
        name = prefix + fused[suffix] if suffix in fused else native_to_hf(native, config)
        shape = hf_shape(native, config)
        if (before := tensors.get(name)) is None:
            tensors[name] = HfTensor(shape, (Part(native),))
        else:
            rows = (before.shape[0] + shape[0], *shape[1:])
            tensors[name] = HfTensor(rows, (*before.parts, Part(native)))
    return tensors


@functools.lru_cache(maxsize=8)
def hf_sources(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The Hugging Face tensors that each native weight comes from."""
    sources: dict[str, tuple[str, ...]] = {}
    for name, tensor in hf_tensors(config).items():
        for part in tensor.parts:
            sources[part.native] = (*sources.get(part.native, ()), name)
    return sources


def read_native(native: str, config: ModelConfig, read: Callable[[str], Any]) -> Any:
    """A native weight from Hugging Face tensors, a view where the library allows.

    Args:
        native: its name.
        config: the architecture.
        read: gives a Hugging Face tensor by name.

    Raises:
        CheckpointError: a tensor's shape is not the one that `config` implies.
    """
    sources = hf_sources(config)[native]
    parts = [_native_part(native, config, name, read(name)) for name in sources]
    per_expert = native.split(".", 2)[-1] in family(config.architecture).hf_experts
    return np.stack(parts) if per_expert else parts[0]


def _native_part(native: str, config: ModelConfig, name: str, array: Any) -> Any:
    tensor = hf_tensors(config)[name]
    if tuple(array.shape) != tensor.shape:
        raise CheckpointError(
            f"{name}: shape {list(array.shape)} in the file, {list(tensor.shape)} by the model's "
            "config"
        )
    if tensor.stacked:
        place = [part.native for part in tensor.parts].index(native)
        return array[..., place :: len(tensor.parts)]
    start = 0
    for part in tensor.parts:
        rows = hf_shape(part.native, config)[0]
        if part.native == native:
            return to_native(native, array[start : start + rows], config)
        start += rows
    raise AssertionError(f"{name} holds no {native}")


def native_outputs(native: str, config: ModelConfig, name: str, values: Any) -> Any:
    """Of `[rows]` of a Hugging Face tensor, one for each of its rows, those of a native weight."""
    start = 0
    for part in hf_tensors(config)[name].parts:
        rows = hf_shape(part.native, config)[0]
        if part.native == native:
            return values[start : start + rows]
        start += rows
    raise AssertionError(f"{name} holds no {native}")


def write_hf(name: str, config: ModelConfig, read: Callable[[str], Any]) -> Any:
    """A Hugging Face tensor from native weights, which `read` gives by name."""
    tensor = hf_tensors(config)[name]
    if tensor.stacked:
        arrays = [read(part.native) for part in tensor.parts]
        return np.stack(arrays, axis=-1).reshape(tensor.shape)
    parts = []
    for part in tensor.parts:
        array = read(part.native)
        parts.append(
            to_hf(part.native, array if part.expert is None else array[part.expert], config)
        )
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def hf_to_native(name: str, config: ModelConfig) -> str | None:
    """The native name of the Hugging Face tensor `name`, or None when `config` has no such weight.

    None covers the unknown, the redundant, and tensors that are not just one weight;
    `is_redundant` and `hf_tensors` tell them apart.
    """
    for native_suffix, hf_suffix in _LORA.items():
        if name.endswith(hf_suffix):
            kernel = _reversed(config).get(_layer_free(name.removesuffix(hf_suffix) + ".weight"))
            native = kernel and kernel.removesuffix(".kernel") + native_suffix
            break
    else:
        native = _reversed(config).get(_layer_free(name))
    if native is not None and (match := _HF_LAYER.fullmatch(name)):
        native = f"layers.{match[1]}.{native}"
    return native if native in _specs(config) else None


def _layer_free(name: str) -> str:
    match = _HF_LAYER.fullmatch(name)
    return match[2] if match else name


@functools.lru_cache(maxsize=8)
def _reversed(config: ModelConfig) -> dict[str, str]:
    """Native names without the layer, by Hugging Face's without the layer."""
    known = family(config.architecture)
    fused = {native for natives in known.hf_fused.values() for native in natives}
    named = {**known.hf_top, **known.hf_layer}
    return {hf: native for native, hf in named.items() if native not in fused}


def is_redundant(name: str, config: ModelConfig) -> bool:
    """Whether a Hugging Face tensor may be dropped: a tied head or an old rotary buffer."""
    return (name == "lm_head.weight" and config.tie_word_embeddings) or name.endswith(
        "rotary_emb.inv_freq"
    )


def native_to_hf(name: str, config: ModelConfig) -> str:
    """The Hugging Face name of the native weight `name`; of several it comes from, the first.

    Raises:
        CheckpointError: `config` has no such weight.
    """
    if name not in _specs(config):
        raise CheckpointError(f"{name}: no such weight in a {config.architecture} module")
    known = family(config.architecture)
    if (match := _NATIVE_LAYER.fullmatch(name)) is None:
        return known.hf_top[name]
    prefix, suffix = f"model.layers.{match[1]}.", match[2]
    for native_suffix, hf_suffix in _LORA.items():
        if suffix.endswith(native_suffix):
            target = suffix.removesuffix(native_suffix) + ".kernel"
            if any(target in natives for natives in known.hf_fused.values()):
                raise CheckpointError(
                    f"{name}: PEFT has no name for it: transformers' {known.name} computes several "
                    "projections as one"
                )
            kernel = known.hf_layer[target]
            return prefix + kernel.removesuffix(".weight") + hf_suffix
    for hf, natives in known.hf_fused.items():
        if suffix in natives:
            return prefix + hf
    for hf, natives in known.hf_stacked.items():
        if suffix in natives:
            return prefix + hf
    if suffix in known.hf_experts:
        return prefix + known.hf_experts[suffix].format(expert=0)
    return prefix + known.hf_layer[suffix]


def has_experts(name: str, config: ModelConfig) -> bool:
    """Whether a native weight has an axis of experts."""
    return _specs(config)[name].axes[0] == "expert"


def _native_shape(name: str, config: ModelConfig, rank: int) -> tuple[int, ...]:
    """Of what one Hugging Face tensor is: without the axis of experts."""
    spec = _specs(config).get(name)
    if spec is None:
        raise CheckpointError(f"{name}: no such weight in a {config.architecture} module")
    if name.endswith(".lora_a"):
        return (*spec.shape[:-1], rank)
    if name.endswith(".lora_b"):
        return (rank, *spec.shape[1:])
    return spec.shape[1:] if spec.axes[0] == "expert" else spec.shape


def hf_shape(name: str, config: ModelConfig, rank: int = 1) -> tuple[int, ...]:
    """The shape of native weight `name` on the Hugging Face side; `rank` is for LoRA factors.

    Of a weight with experts it is that of one expert's tensor, of a fused one that of its rows.
    """
    shape = _native_shape(name, config, rank)
    if name.endswith(".embedding"):
        return shape
    if not _is_matrix(name):
        return (math.prod(shape),)
    inputs = len(shape) - 1 if name.endswith(".lora_a") else 2 if ".attn.o.kernel" in name else 1
    return (math.prod(shape[inputs:]), math.prod(shape[:inputs]))


def _is_matrix(name: str) -> bool:
    return not name.endswith((".scale", ".embedding", ".bias", ".sinks"))


def to_native(name: str, array: Any, config: ModelConfig) -> Any:
    """Lays a Hugging Face tensor out as native weight `name`: a view where the library allows.

    `array` is a numpy or JAX array; its dtype is kept.

    Raises:
        CheckpointError: the array's shape is not the one that `config` implies.
    """
    rank = array.shape[-1 if name.endswith(".lora_b") else 0] if array.ndim else 1
    expected = hf_shape(name, config, rank)
    if tuple(array.shape) != expected:
        raise CheckpointError(
            f"{native_to_hf(name, config)}: shape {list(array.shape)} in the file, "
            f"{list(expected)} by the model's config"
        )
    if _is_matrix(name):
        array = array.T
    return array.reshape(_native_shape(name, config, rank))


def to_hf(name: str, array: Any, config: ModelConfig) -> Any:
    """The inverse of `to_native`: native weight `name` in Hugging Face's layout, dtype kept."""
    rank = array.shape[0 if name.endswith(".lora_b") else -1]
    shape = hf_shape(name, config, rank)
    if _is_matrix(name):
        return array.reshape(shape[::-1]).T
    return array.reshape(shape)
