"""Hugging Face tensors <-> native weights: one table of names and one rule for layouts.

The Hugging Face side stores a linear layer as `[out, in]` with heads flattened into one axis;
the native side stores `[*in, *out]` with heads apart (see `pshare_jax.models.weights`). LoRA
factors follow PEFT: `lora_A.weight [rank, in]` and `lora_B.weight [out, rank]`, their names
without PEFT's `base_model.model.` in front.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

from pshare_jax.errors import CheckpointError
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.weights import (
    LORA_TARGETS,
    WeightSpec,
    lora_specs,
    projection_path,
    weight_specs,
)

PEFT_PREFIX = "base_model.model."

_HF_PROJECTIONS = {
    **{target: f"self_attn.{target}_proj" for target in ("q", "k", "v", "o")},
    **{target: f"mlp.{target}_proj" for target in ("gate", "up", "down")},
}
_TOP = {
    "embed.embedding": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "lm_head.kernel": "lm_head.weight",
}
_LAYER = {
    "attn_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "attn.q_norm.scale": "self_attn.q_norm.weight",
    "attn.k_norm.scale": "self_attn.k_norm.weight",
}
for _target, _hf in _HF_PROJECTIONS.items():
    _LAYER[f"{projection_path(_target)}.kernel"] = f"{_hf}.weight"
    _LAYER[f"{projection_path(_target)}.bias"] = f"{_hf}.bias"
    _LAYER[f"{projection_path(_target)}.lora_a"] = f"{_hf}.lora_A.weight"
    _LAYER[f"{projection_path(_target)}.lora_b"] = f"{_hf}.lora_B.weight"
_TOP_TO_NATIVE = {hf: native for native, hf in _TOP.items()}
_LAYER_TO_NATIVE = {hf: native for native, hf in _LAYER.items()}
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_NATIVE_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


@functools.lru_cache(maxsize=8)
def _specs(config: ModelConfig) -> dict[str, WeightSpec]:
    return weight_specs(config) | lora_specs(config, rank=1, targets=LORA_TARGETS)


def hf_to_native(name: str, config: ModelConfig) -> str | None:
    """The native name of the Hugging Face tensor `name`, or None when `config` has no such weight.

    None covers both the unknown and the redundant; `is_redundant` tells them apart.
    """
    native = _TOP_TO_NATIVE.get(name)
    if match := _HF_LAYER.fullmatch(name):
        suffix = _LAYER_TO_NATIVE.get(match[2])
        native = suffix and f"layers.{match[1]}.{suffix}"
    return native if native in _specs(config) else None


def is_redundant(name: str, config: ModelConfig) -> bool:
    """Whether a Hugging Face tensor may be dropped: a tied head or an old rotary buffer."""
    return (name == "lm_head.weight" and config.tie_word_embeddings) or name.endswith(
        "rotary_emb.inv_freq"
    )


def native_to_hf(name: str, config: ModelConfig) -> str:
    """The Hugging Face name of the native weight `name`.

    Raises:
        CheckpointError: `config` has no such weight.
    """
    if name in _specs(config):
        if name in _TOP:
            return _TOP[name]
        if (match := _NATIVE_LAYER.fullmatch(name)) and match[2] in _LAYER:
            return f"model.layers.{match[1]}.{_LAYER[match[2]]}"
    raise CheckpointError(f"{name}: no such weight in a {config.architecture} module")


def _native_shape(name: str, config: ModelConfig, rank: int) -> tuple[int, ...]:
    spec = _specs(config).get(name)
    if spec is None:
        raise CheckpointError(f"{name}: no such weight in a {config.architecture} module")
    if name.endswith(".lora_a"):
        return (*spec.shape[:-1], rank)
    return (rank, *spec.shape[1:]) if name.endswith(".lora_b") else spec.shape


def hf_shape(name: str, config: ModelConfig, rank: int = 1) -> tuple[int, ...]:
    """The shape of native weight `name` on the Hugging Face side; `rank` is for LoRA factors."""
    shape = _native_shape(name, config, rank)
    if name.endswith((".scale", ".embedding")):
        return shape
    if name.endswith(".bias"):
        return (math.prod(shape),)
    inputs = len(shape) - 1 if name.endswith(".lora_a") else 2 if ".attn.o.kernel" in name else 1
    return (math.prod(shape[inputs:]), math.prod(shape[:inputs]))


def _is_matrix(name: str) -> bool:
    return not name.endswith((".scale", ".embedding", ".bias"))


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
