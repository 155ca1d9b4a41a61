"""gpt-oss: experts with biases and a bounded gate, attention sinks, windows in every second one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pshare_jax.models.config import Experts, LayerSpec, ModelConfig, with_layers
from pshare_jax.models.families.mixtral import GGUF_EXPERTS
from pshare_jax.models.family import (
    FULL,
    HF_LAYER,
    SLIDING,
    Family,
    GGUFMetadata,
    layer_types,
    layers_of_types,
    window_of,
)
from pshare_jax.models.hf_fields import Fields, read_rope
from pshare_jax.models.rope import YarnRopeScaling

SHARPNESS = 1.702
LIMIT = 7.0
WINDOW = 128


class GptOss(Family):
    """See arXiv 2508.10925."""

    name = "gpt_oss"
    hf_architectures = ("GptOssForCausalLM",)
    model_type = "gpt_oss"
    max_position_embeddings = 131072
    num_kv_heads = 8
    head_dim = 64
    rope_theta = 150000.0
    rms_norm_eps = 1e-5
    fixed = {"attention_sinks": True}
    only = {"hidden_act": ("silu",), "swiglu_alpha": (SHARPNESS,), "partial_rotary_factor": (1.0,)}
    hf_layer = {
        **HF_LAYER,
        "attn.sinks": "self_attn.sinks",
        "experts.router.kernel": "mlp.router.weight",
        "experts.router.bias": "mlp.router.bias",
    }
    hf_stacked = {
        f"mlp.experts.{hf}{ending}": tuple(f"experts.{target}.{kind}" for target in targets)
        for hf, targets in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",)))
        for ending, kind in (("", "kernel"), ("_bias", "bias"))
    }
    gguf = "gpt-oss"
    gguf_tensors = "GPT_OSS"
    gguf_layer = {
        "attn.sinks": "attn_sinks.weight",
        "mlp_norm.scale": "post_attention_norm.weight",
        **GGUF_EXPERTS,
        **{
            native.replace(".kernel", ".bias"): name.replace(".weight", ".bias")
            for native, name in GGUF_EXPERTS.items()
        },
    }

    def options(self, fields: Fields, hidden_size: int, head_dim: int) -> dict[str, Any]:
        """All projections of attention have biases, or none."""
        bias = fields.get("attention_bias", bool, True)
        return {"qkv_bias": bias, "o_bias": bias}

    def layers(self, fields: Fields, config: ModelConfig) -> list[LayerSpec]:
        """Every second one sees everything; all have experts."""
        if not (fields.values.get("rope_scaling") or fields.values.get("rope_parameters")):
            raise fields.fail("rope_scaling", "is missing")
        count = config.num_layers
        types = fields.choices("layer_types", count, (FULL, SLIDING))
        types = types or [FULL if i % 2 else SLIDING for i in range(count)]
        experts = Experts(
            fields.positive("num_local_experts", int, 128),
            fields.positive("num_experts_per_tok", int, 4),
            config.intermediate_size,
            biases=True,
            limit=fields.positive("swiglu_limit", float, LIMIT),
        )
        window = fields.positive("sliding_window", int, WINDOW)
        specs = layers_of_types(types, window, read_rope(fields, self.rope_theta))
        return [replace(spec, experts=experts) for spec in specs]

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Numbers of experts, and which layers have windows."""
        experts = config.layer(0).experts
        assert experts is not None
        return {
            "attention_bias": config.qkv_bias,
            "num_local_experts": experts.count,
            "num_experts_per_tok": experts.per_token,
            "swiglu_limit": experts.limit,
            "layer_types": layer_types(config),
            "sliding_window": window_of(config) or WINDOW,
        }

    def config_from_gguf(self, config: ModelConfig, metadata: GGUFMetadata) -> ModelConfig:
        """Every second layer has a window; YaRN's band is not widened, as its makers have it."""
        spec = config.layer(0)
        assert spec.rope is not None
        rope = spec.rope
        if isinstance(rope.scaling, YarnRopeScaling):
            rope = replace(rope, scaling=replace(rope.scaling, truncate=False))
        experts = Experts(
            metadata.size("expert_count"),
            metadata.size("expert_used_count"),
            metadata.size("expert_feed_forward_length", config.intermediate_size),
            biases=True,
            limit=LIMIT,
        )
        types = [FULL if i % 2 else SLIDING for i in range(config.num_layers)]
        specs = layers_of_types(types, spec.sliding_window or WINDOW, rope)
        bias = metadata.has_tensor("blk.0.attn_q.bias")
        config = replace(config, qkv_bias=bias, o_bias=bias)
        return with_layers(config, [replace(spec, experts=experts) for spec in specs])


FAMILY = GptOss()
