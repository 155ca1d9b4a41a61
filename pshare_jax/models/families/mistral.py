"""Mistral 7B and its successors: Llama with a sliding window, which later ones leave out."""

from __future__ import annotations

from typing import Any

from pshare_jax.models.config import LayerSpec, ModelConfig
from pshare_jax.models.family import Family, window_of
from pshare_jax.models.hf_fields import Fields, read_rope


class Mistral(Family):
    """Llama with a window for all layers or none (arXiv 2310.06825)."""

    name = "mistral"
    hf_architectures = ("MistralForCausalLM",)
    model_type = "mistral"
    max_position_embeddings = 131072
    num_kv_heads = 8
    gguf = "mistral"
    gguf_rotates_pairs = True

    def layers(self, fields: Fields, config: ModelConfig) -> list[LayerSpec]:
        """All alike."""
        window = fields.optional("sliding_window", int, 4096)
        return [LayerSpec(window, read_rope(fields))] * config.num_layers

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Null says that there is no window."""
        return {"sliding_window": window_of(config)}


FAMILY = Mistral()
