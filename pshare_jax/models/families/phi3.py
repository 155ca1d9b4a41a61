"""Phi-3 and Phi-4 with plain rotation: Llama with fused projections."""

from __future__ import annotations

from typing import Any

from pshare_jax.models.config import LayerSpec, ModelConfig
from pshare_jax.models.family import Family, window_of
from pshare_jax.models.hf_fields import Fields, read_rope


class Phi3(Family):
    """See arXiv 2404.14219. The long-context variants rotate by the length of the whole sequence
    (`longrope`), which KV that prompts share cannot do: they are refused."""

    name = "phi3"
    hf_architectures = ("Phi3ForCausalLM",)
    model_type = "phi3"
    max_position_embeddings = 4096
    rms_norm_eps = 1e-5
    hf_fused = {
        "self_attn.qkv_proj.weight": ("attn.q.kernel", "attn.k.kernel", "attn.v.kernel"),
        "mlp.gate_up_proj.weight": ("mlp.gate.kernel", "mlp.up.kernel"),
    }

    def layers(self, fields: Fields, config: ModelConfig) -> list[LayerSpec]:
        """All alike."""
        rope = fields.part("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")
        kind = rope.values.get("rope_type", rope.values.get("type", "default"))
        if kind != "default":
            raise rope.fail("rope_type", f"is {kind!r}; of Phi-3 only 'default' is supported")
        window = fields.optional("sliding_window", int)
        return [LayerSpec(window, read_rope(fields))] * config.num_layers

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Null says that there is no window."""
        # transformers' default for the padding token is outside of small vocabularies.
        return {"sliding_window": window_of(config), "pad_token_id": None}


FAMILY = Phi3()
