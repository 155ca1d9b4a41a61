"""SmolLM3: Llama whose every fourth layer does not rotate."""

from __future__ import annotations

from typing import Any

from pshare_jax.models.config import LayerSpec, ModelConfig, with_layers
from pshare_jax.models.families.llama import Llama
from pshare_jax.models.family import FULL, SLIDING, GGUFMetadata, layer_types, window_of
from pshare_jax.models.hf_fields import Fields, read_rope


class SmolLM3(Llama):
    """No positions in some layers (arXiv 2501.18795)."""

    name = "smollm3"
    hf_architectures = ("SmolLM3ForCausalLM",)
    model_type = "smollm3"
    max_position_embeddings = 32768
    num_kv_heads = 4
    rope_theta = 2000000.0
    tie_word_embeddings = True
    gguf = "smollm3"
    gguf_tensors = "SMOLLM3"

    def layers(self, fields: Fields, config: ModelConfig) -> list[LayerSpec]:
        """`no_rope_layers` has a 1 for each layer that rotates."""
        rope, count = read_rope(fields, self.rope_theta), config.num_layers
        interval = fields.positive("no_rope_layer_interval", int, 4)
        default = [int((i + 1) % interval != 0) for i in range(count)]
        rotates = fields.get("no_rope_layers", list, default)
        if len(rotates) != count or not set(rotates) <= {0, 1}:
            raise fields.fail("no_rope_layers", f"is not a 0 or 1 for each of {count} layers")
        windows: list[int | None] = [None] * count
        window = fields.optional("sliding_window", int)
        if window is not None and fields.get("use_sliding_window", bool, False):
            types = fields.choices("layer_types", count, (FULL, SLIDING)) or [
                FULL if rotating else SLIDING for rotating in rotates
            ]
            windows = [window if kind == SLIDING else None for kind in types]
        return [
            LayerSpec(window, rope if rotating else None)
            for window, rotating in zip(windows, rotates, strict=True)
        ]

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Windows are said where there are some."""
        rotates = [int(spec.rope is not None) for spec in config.layer_specs]
        hf = {**super().to_hf(config), "no_rope_layers": rotates, "pad_token_id": None}
        if (window := window_of(config)) is None:
            return hf
        return hf | {
            "sliding_window": window,
            "use_sliding_window": True,
            "layer_types": layer_types(config),
        }

    def config_from_gguf(self, config: ModelConfig, metadata: GGUFMetadata) -> ModelConfig:
        """llama.cpp knows the interval by heart."""
        rope = config.layer(0).rope
        specs = [LayerSpec(None, rope if (i + 1) % 4 else None) for i in range(config.num_layers)]
        return with_layers(super().config_from_gguf(config, metadata), specs)


FAMILY = SmolLM3()
