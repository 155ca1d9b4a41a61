"""Llama 1 to 3.3, and what has its architecture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pshare_jax.models.config import ModelConfig
from pshare_jax.models.family import Family, GGUFMetadata
from pshare_jax.models.hf_fields import Fields


class Llama(Family):
    """Pre-norm layers with grouped KV heads and SwiGLU (arXiv 2407.21783)."""

    name = "llama"
    hf_architectures = ("LlamaForCausalLM",)
    model_type = "llama"
    only = {"hidden_act": ("silu",), "partial_rotary_factor": (1.0,)}
    gguf = "llama"
    gguf_rotates_pairs = True

    def options(self, fields: Fields, hidden_size: int, head_dim: int) -> dict[str, Any]:
        """Biases, which Llama itself has not."""
        of_attention = fields.get("attention_bias", bool, False)
        return {
            "qkv_bias": of_attention,
            "o_bias": of_attention,
            "mlp_bias": fields.get("mlp_bias", bool, False),
        }

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Says nothing of biases that are not there."""
        biases = {"attention_bias": config.o_bias, "mlp_bias": config.mlp_bias}
        return {name: True for name, present in biases.items() if present}

    def config_from_gguf(self, config: ModelConfig, metadata: GGUFMetadata) -> ModelConfig:
        """The tensors say which biases there are."""
        return replace(
            config,
            qkv_bias=metadata.has_tensor("blk.0.attn_q.bias"),
            o_bias=metadata.has_tensor("blk.0.attn_output.bias"),
            mlp_bias=metadata.has_tensor("blk.0.ffn_gate.bias"),
        )


FAMILY = Llama()
