"""Granite 3: Llama with four multipliers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pshare_jax.models.config import ModelConfig
from pshare_jax.models.families.llama import Llama
from pshare_jax.models.family import GGUFMetadata
from pshare_jax.models.hf_fields import Fields


class Granite(Llama):
    """Scores, embeddings, residuals and logits are scaled by numbers of the configuration."""

    name = "granite"
    hf_architectures = ("GraniteForCausalLM",)
    model_type = "granite"
    gguf = "granite"
    gguf_tensors = "GRANITE"

    def options(self, fields: Fields, hidden_size: int, head_dim: int) -> dict[str, Any]:
        """transformers' default for each multiplier is 1."""
        return {
            **super().options(fields, hidden_size, head_dim),
            "query_scale": fields.positive("attention_multiplier", float, 1.0),
            "embedding_scale": fields.positive("embedding_multiplier", float, 1.0),
            "residual_scale": fields.positive("residual_multiplier", float, 1.0),
            "logit_divisor": fields.positive("logits_scaling", float, 1.0),
        }

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """The multipliers by their names."""
        scale = config.query_scale
        return {
            **super().to_hf(config),
            "attention_multiplier": config.head_dim**-0.5 if scale is None else scale,
            "embedding_multiplier": config.embedding_scale,
            "residual_multiplier": config.residual_scale,
            "logits_scaling": config.logit_divisor,
        }

    def config_from_gguf(self, config: ModelConfig, metadata: GGUFMetadata) -> ModelConfig:
        """llama.cpp's default of the first is 1 / sqrt(head_dim)."""
        scale = "attention.scale"
        return replace(
            super().config_from_gguf(config, metadata),
            query_scale=metadata.number(scale) if metadata.has(scale) else None,
            embedding_scale=metadata.number("embedding_scale", 1.0),
            residual_scale=metadata.number("residual_scale", 1.0),
            logit_divisor=metadata.number("logit_scale", 1.0),
        )


FAMILY = Granite()
