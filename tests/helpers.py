"""What tests of several folders share."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pshare_jax.models.config import Experts, LayerSpec, ModelConfig
from pshare_jax.models.lora import LoraModule
from pshare_jax.models.rope import LinearRopeScaling, Llama3RopeScaling, LongRopeScaling, Rope
from pshare_jax.models.weights import Weights

_FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_scaling": Llama3RopeScaling(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        )
    },
    "mistral": {"sliding_window": 5},
    "qwen2": {"qkv_bias": True, "tie_word_embeddings": True},
    "qwen3": {"qk_norm": True},
}
ARCHITECTURES = tuple(_FAMILY_FIELDS)
"""What one configuration for all layers describes."""

_SLIDING, _FULL = LayerSpec(5), LayerSpec()
_GEMMA2 = {
    "norm_adds_one": True,
    "activation": "gelu_tanh",
    "norms": "both",
    "embedding_scale": 48**0.5,
    "query_scale": 24**-0.5,
    "tie_word_embeddings": True,
}
_LATER_FIELDS: dict[str, dict[str, Any]] = {
    "gemma": {
        "norm_adds_one": True,
        "activation": "gelu_tanh",
        "embedding_scale": 48**0.5,
        "tie_word_embeddings": True,
    },
    "gemma2": {
        **_GEMMA2,
        "attention_soft_cap": 2.0,
        "logit_soft_cap": 3.0,
        "layers": (_SLIDING, _FULL),
    },
    "gemma3": {
        **_GEMMA2,
        "qk_norm": True,
        "num_layers": 3,
        "layers": (_SLIDING, _SLIDING, LayerSpec(None, Rope(1e6, LinearRopeScaling(8.0)))),
    },
    "mixtral": {"experts": Experts(4, 2, 64), "rope_theta": 1e6},
    "qwen3_moe": {
        "qk_norm": True,
        "layers": (LayerSpec(experts=Experts(6, 3, 24, normalised=False)), _FULL),
    },
    "phi3": {
        "sliding_window": 5,
        "rope_fraction": 0.75,
        "rope_scaling": LongRopeScaling((1.0, 1.1, 1.5, 2.0, 3.0, 5.0), 1.2, 64),
    },
    "smollm3": {"layers": (_FULL, LayerSpec(rope=None)), "tie_word_embeddings": True},
    "granite": {
        "embedding_scale": 3.0,
        "query_scale": 0.2,
        "residual_scale": 0.5,
        "logit_divisor": 4.0,
    },
    "olmo2": {"norms": "after", "qk_norm": True, "qk_norm_scope": "all_heads"},
    "gpt_oss": {
        "qkv_bias": True,
        "o_bias": True,
        "attention_sinks": True,
        "layers": (
            LayerSpec(5, experts=Experts(4, 2, 64, biases=True, limit=0.5)),
            LayerSpec(experts=Experts(4, 2, 64, biases=True, limit=0.5)),
        ),
    },
}
FAMILIES = (*ARCHITECTURES, *_LATER_FIELDS)
"""All of `models/families`."""


def tiny_config(**overrides: Any) -> ModelConfig:
    """A two-layer decoder with grouped KV heads; `architecture` brings what its family implies."""
    architecture = overrides.get("architecture", "llama")
    config = ModelConfig(
        architecture=architecture,
        vocab_size=256,
        hidden_size=48,
        intermediate_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        **{
            "num_layers": 2,
            **(_FAMILY_FIELDS | _LATER_FIELDS)[architecture],
        },
    )
    return dataclasses.replace(config, **overrides)


def on_device(values: np.ndarray, dtype: Any = jnp.float32) -> jax.Array:
    """As `jnp.asarray`, which compiles a program for each shape that it converts, or takes over."""
    return jax.device_put(np.asarray(values, np.float32).astype(jnp.dtype(dtype)))


def stacked(modules: Sequence[LoraModule]) -> Weights:
    """The bits of `stack_adapters`, which compiles a program for each shape, by NumPy."""
    rank = max(module.rank for module in modules)
    found = {}
    for name in sorted({name for module in modules for name in module.weights}):
        is_a = name.endswith(".lora_a")
        template = next(m.weights[name] for m in modules if name in m.weights)
        rows = (*template.shape[:-1], rank) if is_a else (rank, *template.shape[1:])
        parts = np.zeros((len(modules), *rows), template.dtype)
        for part, module in zip(parts, modules, strict=True):
            if name in module.weights:
                factor = np.asarray(module.weights[name])
                if is_a:
                    part[..., : module.rank] = factor
                else:
                    scale = np.float32(module.alpha / module.rank)
                    part[: module.rank] = (factor.astype(np.float32) * scale).astype(factor.dtype)
        found[name] = jax.device_put(np.moveaxis(parts, 0, -2) if is_a else parts)
    return found


def set_optimisations(on: bool) -> None:
    """Whether XLA optimises what this process compiles, and those that it starts from now on."""
    jax.config.update("jax_disable_most_optimizations", not on)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(not on))


@contextlib.contextmanager
def optimisations() -> Iterator[None]:
    """XLA optimises as it does for users, which tests have it leave out."""
    before = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "0") == "0"
    set_optimisations(True)
    try:
        yield
    finally:
        set_optimisations(before)
