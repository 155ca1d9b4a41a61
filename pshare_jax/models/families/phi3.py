"""Phi-3 and Phi-4: Llama with fused projections; a part of each head may rotate, by LongRoPE."""

from __future__ import annotations

from typing import Any

from pshare_jax.models.config import LayerSpec, ModelConfig
from pshare_jax.models.family import Family, first_rope, window_of
from pshare_jax.models.hf_fields import Fields, read_partial_rope


class Phi3(Family):
    """See arXiv 2404.14219 and, for Phi-4-mini, arXiv 2503.01743."""

    name = "phi3"
    hf_architectures = ("Phi3ForCausalLM",)
    model_type = "phi3"
    max_position_embeddings = 4096
    rms_norm_eps = 1e-5
    only = {k: v for k, v in Family.only.items() if k != "partial_rotary_factor"}
    hf_fused = {
        "self_attn.qkv_proj.weight": ("attn.q.kernel", "attn.k.kernel", "attn.v.kernel"),
        "mlp.gate_up_proj.weight": ("mlp.gate.kernel", "mlp.up.kernel"),
    }
    gguf = "phi3"
    gguf_tensors = "PHI3"
    gguf_rotates_part = True

    def layers(self, fields: Fields, config: ModelConfig) -> list[LayerSpec]:
        """All alike."""
        for name in ("rope_parameters", "rope_scaling"):
            rope = fields.part(name)
            kind = rope.values.get("rope_type", rope.values.get("type", "default"))
            if kind not in ("default", "longrope", "su"):
                raise rope.fail(
                    "rope_type", f"is {kind!r}; of Phi-3 'default' and 'longrope' are supported"
                )
        window = fields.optional("sliding_window", int)
        return [LayerSpec(window, read_partial_rope(fields, config.head_dim))] * config.num_layers

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Null says that there is no window."""
        # transformers' default for the padding token is outside of small vocabularies.
        hf: dict[str, Any] = {"sliding_window": window_of(config), "pad_token_id": None}
        if (fraction := first_rope(config).fraction) != 1.0:
            hf["partial_rotary_factor"] = fraction
        return hf


FAMILY = Phi3()
