"""Mixtral: Mistral with experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pshare_jax.models.config import Experts, LayerSpec, ModelConfig
from pshare_jax.models.family import HF_LAYER, Family, GGUFMetadata, window_of
from pshare_jax.models.hf_fields import Fields, read_rope

GGUF_EXPERTS = {
    "experts.router.kernel": "ffn_gate_inp.weight",
    "experts.gate.kernel": "ffn_gate_exps.weight",
    "experts.up.kernel": "ffn_up_exps.weight",
    "experts.down.kernel": "ffn_down_exps.weight",
}


class Mixtral(Family):
    """See arXiv 2401.04088."""

    name = "mixtral"
    hf_architectures = ("MixtralForCausalLM",)
    model_type = "mixtral"
    max_position_embeddings = 131072
    num_kv_heads = 8
    rope_theta = 1000000.0
    rms_norm_eps = 1e-5
    hf_layer = {**HF_LAYER, "experts.router.kernel": "block_sparse_moe.gate.weight"}
    hf_experts = {
        "experts.gate.kernel": "block_sparse_moe.experts.{expert}.w1.weight",
        "experts.up.kernel": "block_sparse_moe.experts.{expert}.w3.weight",
        "experts.down.kernel": "block_sparse_moe.experts.{expert}.w2.weight",
    }
    # GGUF writes it as a llama with experts, see `convert/gguf.py`.
    gguf_layer = GGUF_EXPERTS
    gguf_rotates_pairs = True

    def layers(self, fields: Fields, config: ModelConfig) -> list[LayerSpec]:
        """All alike."""
        experts = Experts(
            fields.positive("num_local_experts", int, 8),
            fields.positive("num_experts_per_tok", int, 2),
            config.intermediate_size,
        )
        window = fields.optional("sliding_window", int)
        return [LayerSpec(window, read_rope(fields, self.rope_theta), experts)] * config.num_layers

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Numbers of experts."""
        experts = config.layer(0).experts
        assert experts is not None
        return {
            "num_local_experts": experts.count,
            "num_experts_per_tok": experts.per_token,
            "sliding_window": window_of(config),
        }

    def config_from_gguf(self, config: ModelConfig, metadata: GGUFMetadata) -> ModelConfig:
        """Numbers of experts."""
        experts = Experts(
            metadata.size("expert_count"),
            metadata.size("expert_used_count"),
            config.intermediate_size,
        )
        return replace(config, experts=experts)


FAMILY = Mixtral()
