"""Gemma 3, text: five layers with windows for each without, which rotate more slowly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pshare_jax.models.config import ModelConfig, with_layers
from pshare_jax.models.families.gemma2 import Gemma2, pattern
from pshare_jax.models.family import GGUFMetadata, layers_of_types
from pshare_jax.models.hf_fields import Fields, rope_of, rope_to_hf
from pshare_jax.models.rope import Rope

FULL_THETA, SLIDING_THETA = 1e6, 1e4
EVERY = 6


class Gemma3(Gemma2):
    """See arXiv 2503.19786."""

    name = "gemma3"
    hf_architectures = ("Gemma3ForCausalLM",)
    model_type = "gemma3_text"
    max_position_embeddings = 131072
    fixed = {**Gemma2.fixed, "qk_norm": True}
    gguf = "gemma3"
    gguf_tensors = "GEMMA3"
    soft_caps = (None, None)
    largest_layers = 62

    def default_types(self, fields: Fields, count: int) -> list[str]:
        """The pattern as it was written before there were `layer_types`."""
        return pattern(fields.positive("sliding_window_pattern", int, EVERY), count)

    def ropes(self, fields: Fields) -> Sequence[Rope]:
        """transformers 5 has an object for each kind of layer, 4 the field
        `rope_local_base_freq` for windows, which no scaling applies to."""
        nested = fields.part("rope_parameters")
        old = fields.part("rope_scaling")
        full = nested.part("full_attention") if nested.has("full_attention") else old
        theta = fields.positive("rope_theta", float, FULL_THETA)
        local = fields.positive("rope_local_base_freq", float, SLIDING_THETA)
        return rope_of(full, fields, theta), rope_of(
            nested.part("sliding_attention"), fields, local
        )

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Both forms, which transformers 4 and 5 read."""
        full, sliding = _ropes(config)
        hf = super().to_hf(config)
        hf["rope_theta"], hf["rope_local_base_freq"] = full.theta, sliding.theta
        hf["rope_scaling"] = rope_to_hf(full.scaling)
        return hf

    def gguf_layers(self, config: ModelConfig, metadata: GGUFMetadata) -> ModelConfig:
        """Files made before llama.cpp wrote the pattern and the theta of windows lack them."""
        spec = config.layer(0)
        assert spec.rope is not None
        every = metadata.optional("attention.sliding_window_pattern", int, EVERY)
        sliding = Rope(metadata.number("rope.freq_base_swa", SLIDING_THETA))
        types = pattern(every, config.num_layers)
        layers = layers_of_types(types, spec.sliding_window, spec.rope, sliding)
        return with_layers(config, layers)


def _ropes(config: ModelConfig) -> tuple[Rope, Rope]:
    """Of layers without and with a window."""
    full, sliding = Rope(FULL_THETA), Rope(SLIDING_THETA)
    for spec in config.layer_specs:
        assert spec.rope is not None
        if spec.sliding_window is None:
            full = spec.rope
        else:
            sliding = spec.rope
    return full, sliding


FAMILY = Gemma3()
