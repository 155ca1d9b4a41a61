"""OLMo 2: norms after the blocks, and over all heads of queries and keys together."""

from __future__ import annotations

from typing import Any

from pshare_jax.models.config import ModelConfig
from pshare_jax.models.family import HF_LAYER, Family


class Olmo2(Family):
    """See arXiv 2501.00656."""

    name = "olmo2"
    hf_architectures = ("Olmo2ForCausalLM",)
    model_type = "olmo2"
    rms_norm_eps = 1e-5
    fixed = {"norms": "after", "qk_norm": True, "qk_norm_scope": "all_heads"}
    hf_layer = {
        **HF_LAYER,
        "attn_post_norm.scale": "post_attention_layernorm.weight",
        "mlp_post_norm.scale": "post_feedforward_layernorm.weight",
    }
    gguf = "olmo2"
    gguf_tensors = "OLMO2"
    gguf_layer = {
        "attn_post_norm.scale": "post_attention_norm.weight",
        "mlp_post_norm.scale": "post_ffw_norm.weight",
    }

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """transformers' default for the padding token is outside of small vocabularies."""
        del config
        return {"pad_token_id": None}


FAMILY = Olmo2()
