"""What a family of models is: how its checkpoints name things, and what it computes differently.

A family is one file in `models/families`, found by `models/registry`. Most are a composition of the
shared blocks, chosen by fields of `ModelConfig`; one that computes something new brings a layer of
its own (`decoder_layer`) and says which weights it has (`layer_weights`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from pshare_jax.models.config import MAX_LAYERS, LayerSpec, ModelConfig, with_layers
from pshare_jax.models.hf_fields import Fields, longest_context, read_rope, rope_to_hf
from pshare_jax.models.rope import LongRopeScaling, Rope

if TYPE_CHECKING:
    from pshare_jax.models.weights import WeightSpec

HF_TOP: Mapping[str, str] = {
    "embed.embedding": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "lm_head.kernel": "lm_head.weight",
}
HF_LAYER: Mapping[str, str] = {
    "attn_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "attn.q_norm.scale": "self_attn.q_norm.weight",
    "attn.k_norm.scale": "self_attn.k_norm.weight",
    **{
        f"{block}.{target}.{native}": f"{hf_block}.{target}_proj.{hf}"
        for block, hf_block, targets in (
            ("attn", "self_attn", ("q", "k", "v", "o")),
            ("mlp", "mlp", ("gate", "up", "down")),
        )
        for target in targets
        for native, hf in (("kernel", "weight"), ("bias", "bias"))
    },
}
"""Names within a layer, as Llama has them; other families change a few."""

FULL, SLIDING = "full_attention", "sliding_attention"


class GGUFMetadata(Protocol):
    """The hyper-parameters in a GGUF file, by their name without the architecture's in front."""

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        ...

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        ...

    def has(self, key: str) -> bool:
        """Whether it is there."""
        ...

    def optional(self, key: str, kind: type, default: Any) -> Any:
        """A value of type `kind`, or the default."""
        ...

    def has_tensor(self, name: str) -> bool:
        """Whether the file has a tensor of that name."""
        ...


class Family:
    """One family; `models/families` has an instance of a subclass in each file, named `FAMILY`.

    Attributes:
        name: what `ModelConfig.architecture` says.
        hf_architectures: transformers' classes; the first is written on export.
        model_type: transformers' `model_type`.
        max_position_embeddings: default of the field; as the next ones, transformers' own.
        num_kv_heads: None for as many as query heads.
        head_dim: None for hidden size / query heads.
        rope_theta: default.
        rms_norm_eps: default.
        tie_word_embeddings: default.
        fixed: fields of `ModelConfig` that have one value in this family.
        only: fields of `config.json` that are refused with other values than those.
        hf_top: native names of weights beside the layers to Hugging Face's.
        hf_layer: the same within a layer.
        hf_fused: names of Hugging Face tensors that hold several weights of a layer one after
            another, to the native names of these.
        hf_stacked: names of Hugging Face tensors of a layer that hold all experts, native layout,
            to the native names of the weights whose last axes alternate in them.
        hf_experts: native names of weights with an axis of experts to Hugging Face's name of one
            expert's part, with `{expert}` for its number.
        gguf: GGUF's name of the architecture; None where it has none.
        gguf_tensors: the name in `gguf.MODEL_ARCH` whose tensor names it uses.
        gguf_layer: native names of weights of a layer to GGUF's names within a block, where these
            do not follow from Hugging Face's.
        gguf_rotates_pairs: whether GGUF stores queries and keys for rotating neighbouring pairs.
        gguf_rotates_part: whether a GGUF file may say that a part of each head rotates.
        decoder_layer: a class like `blocks.layer.DecoderLayer`, in place of it.
    """

    name: ClassVar[str]
    hf_architectures: ClassVar[tuple[str, ...]]
    model_type: ClassVar[str]
    max_position_embeddings: ClassVar[int] = 2048
    num_kv_heads: ClassVar[int | None] = None
    head_dim: ClassVar[int | None] = None
    rope_theta: ClassVar[float] = 10000.0
    rms_norm_eps: ClassVar[float] = 1e-6
    tie_word_embeddings: ClassVar[bool] = False
    fixed: ClassVar[Mapping[str, Any]] = {}
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "partial_rotary_factor": (1.0,),
    }
    hf_top: ClassVar[Mapping[str, str]] = HF_TOP
    hf_layer: ClassVar[Mapping[str, str]] = HF_LAYER
    hf_fused: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    hf_stacked: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    hf_experts: ClassVar[Mapping[str, str]] = {}
    gguf: ClassVar[str | None] = None
    gguf_tensors: ClassVar[str] = "LLAMA"
    gguf_layer: ClassVar[Mapping[str, str]] = {}
    gguf_rotates_pairs: ClassVar[bool] = False
    gguf_rotates_part: ClassVar[bool] = False
    decoder_layer: ClassVar[type | None] = None

    def layer_weights(self, config: ModelConfig, layer: int) -> dict[str, WeightSpec] | None:
        """The weights of a layer of `decoder_layer`; None for those of the shared one."""
        del config, layer

    def config_from_hf(self, fields: Fields) -> ModelConfig:
        """The decoder that a `config.json` describes.

        Raises:
            CheckpointError: names the field that is missing, of the wrong type or not supported.
        """
        for field, supported in self.only.items():
            fields.only(field, *supported)
        heads = fields.positive("num_attention_heads", int)
        hidden_size = fields.positive("hidden_size", int)
        # An explicit null means one KV head a query head; absence means the family's default.
        absent = None if fields.has("num_key_value_heads") else self.num_kv_heads
        num_kv_heads = fields.positive("num_key_value_heads", int, absent or heads)
        absent = None if fields.has("head_dim") else self.head_dim
        head_dim = fields.positive("head_dim", int, absent or max(hidden_size // heads, 1))
        if heads % num_kv_heads:
            raise fields.fail(
                "num_attention_heads", f"({heads}) is no multiple of {num_kv_heads} KV heads"
            )
        if head_dim % 2:
            raise fields.fail("head_dim", f"is {head_dim}, but must be even")
        num_layers = fields.positive("num_hidden_layers", int)
        if num_layers > MAX_LAYERS:
            raise fields.fail(
                "num_hidden_layers", f"is {num_layers}; at most {MAX_LAYERS} are possible"
            )
        config = ModelConfig(
            **{
                "architecture": self.name,
                "vocab_size": fields.positive("vocab_size", int),
                "hidden_size": hidden_size,
                "intermediate_size": self.intermediate_size(fields),
                "num_layers": num_layers,
                "num_heads": heads,
                "num_kv_heads": num_kv_heads,
                "head_dim": head_dim,
                "rms_norm_eps": fields.positive("rms_norm_eps", float, self.rms_norm_eps),
                "max_position_embeddings": longest_context(fields, self.max_position_embeddings),
                "tie_word_embeddings": fields.get(
                    "tie_word_embeddings", bool, self.tie_word_embeddings
                ),
                **self.fixed,
                **self.options(fields, hidden_size, head_dim),
            }
        )
        config = with_layers(config, self.layers(fields, config))
        for rope in {spec.rope for spec in config.layer_specs if spec.rope}:
            factors = getattr(rope.scaling, "factors", None)
            if factors is not None and 2 * len(factors) != rope.rotated(head_dim):
                raise fields.fail(
                    "rope_scaling",
                    f"of type longrope has {len(factors)} factors, but "
                    f"{rope.rotated(head_dim) // 2} components rotate",
                )
        return config

    def intermediate_size(self, fields: Fields) -> int:
        """Of dense feed-forward blocks."""
        return fields.positive("intermediate_size", int)

    def options(self, fields: Fields, hidden_size: int, head_dim: int) -> dict[str, Any]:
        """Further fields of `ModelConfig` that `config.json` decides."""
        del fields, hidden_size, head_dim
        return {}

    def layers(self, fields: Fields, config: ModelConfig) -> list[LayerSpec]:
        """The layers; by default all rotate as `read_rope` says and see everything."""
        return [LayerSpec(None, read_rope(fields, self.rope_theta))] * config.num_layers

    def config_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """A `config.json` that transformers 4 and 5 load as this decoder."""
        hf: dict[str, Any] = {
            "architectures": [self.hf_architectures[0]],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": config.rms_norm_eps,
            "max_position_embeddings": config.max_position_embeddings,
            "tie_word_embeddings": config.tie_word_embeddings,
        }
        rope = first_rope(config)
        hf["rope_theta"] = rope.theta
        if rope.scaling is not None:
            hf["rope_scaling"] = rope_to_hf(rope.scaling)
        return hf | self.to_hf(config)

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Fields of `config.json` that this family has besides, or has otherwise."""
        del config
        return {}

    def config_from_gguf(self, config: ModelConfig, metadata: GGUFMetadata) -> ModelConfig:
        """What a GGUF file says besides what all of them say, which `config` has already."""
        del metadata
        return config

    def weight_from_gguf(self, native: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
        """Undoes what GGUF's converter does to a weight, which is in Hugging Face's layout."""
        del native, config
        return array


def first_rope(config: ModelConfig) -> Rope:
    """The rotary embedding of the first layer that has one."""
    return next((spec.rope for spec in config.layer_specs if spec.rope is not None), Rope())


def uses_long_factors(config: ModelConfig) -> bool:
    """Whether LongRoPE's factors for long contexts are those of a configuration."""
    scaling = first_rope(config).scaling
    return isinstance(scaling, LongRopeScaling) and (
        config.max_position_embeddings > scaling.original_max_position_embeddings
    )


def layers_of_types(
    types: list[str], window: int | None, rope: Rope, sliding_rope: Rope | None = None
) -> list[LayerSpec]:
    """Layers that see everything (`full_attention`) or a window (`sliding_attention`)."""
    sliding = LayerSpec(window, sliding_rope or rope)
    return [sliding if kind == SLIDING else LayerSpec(None, rope) for kind in types]


def layer_types(config: ModelConfig) -> list[str]:
    """transformers' `layer_types` of a configuration."""
    return [SLIDING if spec.sliding_window else FULL for spec in config.layer_specs]


def window_of(config: ModelConfig) -> int | None:
    """The one window of all layers that have one."""
    return next((s.sliding_window for s in config.layer_specs if s.sliding_window), None)
