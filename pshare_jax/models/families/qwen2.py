"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from pshare_jax.models.config import LayerSpec, ModelConfig
from pshare_jax.models.family import (
    FULL,
    SLIDING,
    Family,
    layer_types,
    layers_of_types,
    window_of,
)
from pshare_jax.models.hf_fields import Fields, read_rope


class Qwen2(Family):
    """Windows, where they are turned on, begin with some layer (arXiv 2407.10671)."""

    name = "qwen2"
    hf_architectures = ("Qwen2ForCausalLM",)
    model_type = "qwen2"
    max_position_embeddings = 32768
    num_kv_heads = 32
    fixed = {"qkv_bias": True}
    gguf = "qwen2"
    gguf_tensors = "QWEN2"

    def layers(self, fields: Fields, config: ModelConfig) -> list[LayerSpec]:
        """Those from `max_window_layers` on have the window, unless `layer_types` says it."""
        rope, count = read_rope(fields), config.num_layers
        window = fields.optional("sliding_window", int, 4096)
        if window is None or not fields.get("use_sliding_window", bool, False):
            return [LayerSpec(None, rope)] * count
        first = fields.get("max_window_layers", int, 28)
        types = fields.choices("layer_types", count, (FULL, SLIDING)) or [
            SLIDING if i >= first else FULL for i in range(count)
        ]
        return layers_of_types(types, window, rope)

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Nothing about windows where there are none."""
        if (window := window_of(config)) is None:
            return {}
        types = layer_types(config)
        return {
            "sliding_window": window,
            "use_sliding_window": True,
            "max_window_layers": types.index(SLIDING),
            "layer_types": types,
        }


FAMILY = Qwen2()
