"""Gemma 2: Gemma with norms around both blocks, windows in every second layer, and soft caps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pshare_jax.models.config import LayerSpec, ModelConfig, with_layers
from pshare_jax.models.families.gemma import Gemma
from pshare_jax.models.family import (
    FULL,
    HF_LAYER,
    SLIDING,
    GGUFMetadata,
    layer_types,
    layers_of_types,
    window_of,
)
from pshare_jax.models.hf_fields import Fields, read_rope

HF_NORMS = {
    "attn_norm.scale": "input_layernorm.weight",
    "attn_post_norm.scale": "post_attention_layernorm.weight",
    "mlp_norm.scale": "pre_feedforward_layernorm.weight",
    "mlp_post_norm.scale": "post_feedforward_layernorm.weight",
}


class Gemma2(Gemma):
    """See arXiv 2408.00118."""

    name = "gemma2"
    hf_architectures = ("Gemma2ForCausalLM",)
    model_type = "gemma2"
    num_kv_heads = 4
    fixed = {**Gemma.fixed, "norms": "both"}
    only = {field: values for field, values in Gemma.only.items() if field != "hidden_act"}
    hf_layer = {**HF_LAYER, **HF_NORMS}
    gguf = "gemma2"
    gguf_tensors = "GEMMA2"
    gguf_layer = {
        "attn_post_norm.scale": "post_attention_norm.weight",
        "mlp_norm.scale": "ffn_norm.weight",
        "mlp_post_norm.scale": "post_ffw_norm.weight",
    }
    soft_caps: tuple[float | None, float | None] = (50.0, 30.0)
    """Defaults: of scores and of logits."""
    largest_layers = 46
    """The largest model's scores are scaled by its hidden size; GGUF does not say so."""

    def options(self, fields: Fields, hidden_size: int, head_dim: int) -> dict[str, Any]:
        """Soft caps, and the scores' scale."""
        attention_cap, logit_cap = self.soft_caps
        scalar = fields.positive("query_pre_attn_scalar", float, 256.0)
        return {
            **super().options(fields, hidden_size, head_dim),
            "query_scale": query_scale(scalar, head_dim),
            "attention_soft_cap": fields.optional("attn_logit_softcapping", float, attention_cap),
            "logit_soft_cap": fields.optional("final_logit_softcapping", float, logit_cap),
        }

    def default_types(self, fields: Fields, count: int) -> list[str]:
        """Windows and full attention in turn."""
        del fields
        return pattern(2, count)

    def layers(self, fields: Fields, config: ModelConfig) -> list[LayerSpec]:
        """As `layer_types` says."""
        types = fields.choices("layer_types", config.num_layers, (FULL, SLIDING))
        types = types or self.default_types(fields, config.num_layers)
        window = fields.optional("sliding_window", int, 4096)
        return layers_of_types(types, window, *self.ropes(fields))

    def ropes(self, fields: Fields) -> Sequence[Any]:
        """The rotary embedding of full attention, and that of windows where it is another."""
        return (read_rope(fields),)

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """The scalar is the inverse square of the scale."""
        scale = config.query_scale
        return {
            **super().to_hf(config),
            "query_pre_attn_scalar": config.head_dim if scale is None else round(scale**-2),
            "attn_logit_softcapping": config.attention_soft_cap,
            "final_logit_softcapping": config.logit_soft_cap,
            "sliding_window": window_of(config) or 4096,
            "layer_types": layer_types(config),
        }

    def config_from_gguf(self, config: ModelConfig, metadata: GGUFMetadata) -> ModelConfig:
        """llama.cpp knows the pattern and the largest model's scale by heart."""
        config = super().config_from_gguf(config, metadata)
        scalar = config.head_dim
        if config.num_layers == self.largest_layers:
            scalar = config.hidden_size // config.num_heads
        keys = ("attn_logit_softcapping", "final_logit_softcapping")
        attention_cap, logit_cap = (
            metadata.number(key) if metadata.has(key) else default
            for key, default in zip(keys, self.soft_caps, strict=True)
        )
        config = replace(
            config,
            query_scale=query_scale(scalar, config.head_dim),
            attention_soft_cap=attention_cap,
            logit_soft_cap=logit_cap,
        )
        return self.gguf_layers(config, metadata)

    def gguf_layers(self, config: ModelConfig, metadata: GGUFMetadata) -> ModelConfig:
        """All layers rotate alike."""
        del metadata
        spec = config.layer(0)
        types = pattern(2, config.num_layers)
        assert spec.rope is not None
        return with_layers(config, layers_of_types(types, spec.sliding_window or 4096, spec.rope))


def pattern(every: int, count: int) -> list[str]:
    """Windows in all layers but each `every`-th."""
    return [SLIDING if (i + 1) % every else FULL for i in range(count)]


def query_scale(scalar: float, head_dim: int) -> float | None:
    """`ModelConfig.query_scale` of a `query_pre_attn_scalar`."""
    return None if scalar == head_dim else scalar**-0.5


FAMILY = Gemma2()
