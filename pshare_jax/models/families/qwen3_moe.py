"""Qwen3 with experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pshare_jax.models.config import Experts, LayerSpec, ModelConfig, with_layers
from pshare_jax.models.families.mixtral import GGUF_EXPERTS
from pshare_jax.models.families.qwen3 import Qwen3
from pshare_jax.models.family import HF_LAYER, GGUFMetadata
from pshare_jax.models.hf_fields import Fields


class Qwen3Moe(Qwen3):
    """See arXiv 2505.09388; some layers may be dense."""

    name = "qwen3_moe"
    hf_architectures = ("Qwen3MoeForCausalLM",)
    model_type = "qwen3_moe"
    num_kv_heads = 4
    # transformers' class has no default of its own: hidden size / heads.
    head_dim = None
    only = {**Qwen3.only, "use_sliding_window": (False,)}
    hf_layer = {**HF_LAYER, "experts.router.kernel": "mlp.gate.weight"}
    hf_experts = {
        f"experts.{target}.kernel": f"mlp.experts.{{expert}}.{target}_proj.weight"
        for target in ("gate", "up", "down")
    }
    gguf = "qwen3moe"
    gguf_tensors = "QWEN3MOE"
    gguf_layer = GGUF_EXPERTS

    def layers(self, fields: Fields, config: ModelConfig) -> list[LayerSpec]:
        """Every `decoder_sparse_step`-th has experts, but for `mlp_only_layers`."""
        experts = Experts(
            fields.positive("num_experts", int, fields.values.get("num_local_experts") or 128),
            fields.positive("num_experts_per_tok", int, 8),
            fields.positive("moe_intermediate_size", int, 768),
            fields.get("norm_topk_prob", bool, False),
        )
        dense = fields.get("mlp_only_layers", list, [])
        step = fields.positive("decoder_sparse_step", int, 1)
        specs = [
            replace(spec, experts=experts if i not in dense and (i + 1) % step == 0 else None)
            for i, spec in enumerate(super().layers(fields, config))
        ]
        if not any(spec.experts for spec in specs):
            raise fields.fail("mlp_only_layers", "leaves no layer with experts")
        return specs

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Dense layers one by one."""
        specs = [spec.experts for spec in config.layer_specs]
        experts = next(spec for spec in specs if spec is not None)
        return {
            "num_experts": experts.count,
            "num_experts_per_tok": experts.per_token,
            "moe_intermediate_size": experts.intermediate_size,
            "norm_topk_prob": experts.normalised,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, spec in enumerate(specs) if spec is None],
        }

    def config_from_gguf(self, config: ModelConfig, metadata: GGUFMetadata) -> ModelConfig:
        """All layers have experts, and weights are normalised."""
        experts = Experts(
            metadata.size("expert_count"),
            metadata.size("expert_used_count"),
            metadata.size("expert_feed_forward_length"),
        )
        return with_layers(config, [replace(spec, experts=experts) for spec in config.layer_specs])


FAMILY = Qwen3Moe()
