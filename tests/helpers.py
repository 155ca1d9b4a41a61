"""What tests of several folders share."""

from __future__ import annotations

import dataclasses
from typing import Any

from pshare_jax.models.config import ModelConfig
from pshare_jax.models.rope import Llama3RopeScaling

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


def tiny_config(**overrides: Any) -> ModelConfig:
    """A two-layer decoder with grouped KV heads; `architecture` brings what its family implies."""
    architecture = overrides.get("architecture", "llama")
    config = ModelConfig(
        architecture=architecture,
        vocab_size=256,
        hidden_size=48,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        **_FAMILY_FIELDS[architecture],
    )
    return dataclasses.replace(config, **overrides)
