"""The shape of a decoder: one configuration that the families of `models/families` fill in.

Every field has the meaning that blocks give it, whatever the family; a family says which values its
checkpoints imply. Defaults, once released, may not change: fingerprints leave them out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pshare_jax.models.rope import Rope, RopeScaling, scaling_from_json, scaling_to_json

Activation = Literal["silu", "gelu_tanh"]
NormPlacement = Literal["before", "after", "both"]
QkNormScope = Literal["head", "all_heads"]
WeightFormat = Literal["plain", "int8", "int8-layers", "int8-dynamic", "fp8", "fp8-layers"]

MAX_LAYERS = 4096
"""More is taken for a damaged or hostile file; the deepest published decoders have about 130."""


@dataclass(frozen=True)
class Experts:
    """A feed-forward block of which each token takes a few parts (arXiv 1701.06538).

    Args:
        count: number of experts.
        per_token: of how many a token takes the weighted sum, those of the highest router scores.
        intermediate_size: of each expert.
        normalised: whether the weights, a softmax over all experts, are divided by their sum over
            the chosen ones.
        biases: whether the router and the experts have biases.
        limit: what gates and the other factors are bounded by, in gpt-oss's way (see
            `kernels/experts`), or None.
    """

    count: int
    per_token: int
    intermediate_size: int
    normalised: bool = True
    biases: bool = False
    limit: float | None = None

    def __post_init__(self) -> None:
        for name in ("count", "per_token", "intermediate_size"):
            _check_size(f"experts.{name}", getattr(self, name))
        if self.per_token > self.count:
            raise ValueError(f"experts.per_token is {self.per_token} of {self.count} experts")


@dataclass(frozen=True)
class LayerSpec:
    """What may differ from layer to layer.

    Args:
        sliding_window: number of most recent positions a query sees (itself included), or None for
            full attention.
        rope: the rotary embedding of queries and keys, or None for no positions at all.
        experts: the experts of the feed-forward block, or None for a dense one.
    """

    sliding_window: int | None = None
    rope: Rope | None = Rope()  # noqa: RUF009 - frozen
    experts: Experts | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Hyper-parameters of one decoder. Sizes are element counts.

    Where all layers are alike, `rope_theta`, `rope_scaling`, `rope_fraction`, `sliding_window` and
    `experts` say how and `layers` is empty; otherwise `layers` has an entry for each, and those
    fields are as by default. `with_layers` chooses; `layer` reads both.

    Args:
        architecture: the family, a key of `models.registry`.
        vocab_size: rows of the embedding.
        hidden_size: of the residual stream.
        intermediate_size: of dense feed-forward blocks.
        num_layers: layers.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: size of a head.
        rope_theta: base of the rotary embedding's wavelengths.
        rope_scaling: how its frequencies are changed for longer contexts.
        rope_fraction: what part of each head rotates, see `Rope`.
        rms_norm_eps: of every norm.
        max_position_embeddings: longest context, in tokens.
        tie_word_embeddings: whether the output head is the embedding.
        qkv_bias: whether queries, keys and values have biases.
        qk_norm: whether queries and keys are normalised before they are rotated.
        sliding_window: see `LayerSpec`.
        experts: see `LayerSpec`.
        layers: see above.
        o_bias: whether the attention's output projection has a bias.
        mlp_bias: whether gate, up and down have biases.
        activation: of the gate.
        norm_adds_one: whether norms multiply by 1 + weight, not by weight.
        norms: where a block's norm stands: `before` it, `after` it (before the residual is
            added), or `both`.
        qk_norm_scope: over what queries and keys are normalised: each `head` by the same weights,
            or `all_heads` together.
        query_scale: what scores are multiplied by; None is 1 / sqrt(head_dim).
        attention_soft_cap: scores are bounded to c * tanh(score / c), or None.
        attention_sinks: whether each head has a score besides, which takes weight and gives
            nothing (arXiv 2309.17453).
        logit_soft_cap: the same for logits.
        embedding_scale: what token embeddings are multiplied by.
        residual_scale: what a block's output is multiplied by before it is added.
        logit_divisor: what logits are divided by.
        options: what a family of its own needs besides, as sorted pairs of name and value.
        weight_format: `int8` or `fp8` for projections of 8 bits, `int8-dynamic` if what they
            multiply is rounded too, see `quantise`.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_fraction: float = 1.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    experts: Experts | None = None
    layers: tuple[LayerSpec, ...] = ()
    o_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    norm_adds_one: bool = False
    norms: NormPlacement = "before"
    qk_norm_scope: QkNormScope = "head"
    query_scale: float | None = None
    attention_soft_cap: float | None = None
    attention_sinks: bool = False
    logit_soft_cap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    options: tuple[tuple[str, Any], ...] = ()
    weight_format: WeightFormat = "plain"

    def __post_init__(self) -> None:
        for name in _SIZES:
            _check_size(name, getattr(self, name))
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers is {self.num_layers}; at most {MAX_LAYERS} are supported")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of "
                f"num_kv_heads ({self.num_kv_heads})"
            )
        if not self.layers:
            return
        if len(self.layers) != self.num_layers:
            raise ValueError(f"layers describes {len(self.layers)} of {self.num_layers} layers")
        for name, default in _OF_ALL_LAYERS.items():
            if getattr(self, name) != default:
                raise ValueError(f"{name} is set, although layers says it for each layer")

    def layer(self, index: int) -> LayerSpec:
        """What layer `index` is."""
        return _layer_specs(self)[index]

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """What each layer is."""
        return _layer_specs(self)

    @property
    def has_experts(self) -> bool:
        """Whether some layer has experts."""
        return any(layer.experts is not None for layer in self.layer_specs)

    def with_weights(self, form: WeightFormat) -> ModelConfig:
        """The same decoder with weights in another form."""
        return dataclasses.replace(self, weight_format=form)

    def option(self, name: str) -> Any:
        """A value of `options`."""
        return dict(self.options)[name]


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_position_embeddings",
)
_OF_ALL_LAYERS = {
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_fraction": 1.0,
    "sliding_window": None,
    "experts": None,
}


def _check_size(name: str, size: Any) -> None:
    if type(size) is not int or size < 1:
        raise ValueError(f"{name} is {size!r}, but must be a positive integer")


@functools.lru_cache(maxsize=64)
def _layer_specs(config: ModelConfig) -> tuple[LayerSpec, ...]:
    if config.layers:
        return config.layers
    rope = Rope(config.rope_theta, config.rope_scaling, config.rope_fraction)
    return (LayerSpec(config.sliding_window, rope, config.experts),) * config.num_layers


def with_layers(config: ModelConfig, layers: Sequence[LayerSpec]) -> ModelConfig:
    """`config` with these layers, in the one form that such layers have; see `ModelConfig`."""
    plain = dataclasses.replace(config, layers=(), **_OF_ALL_LAYERS)
    first = layers[0]
    if set(layers) == {first} and first.rope is not None:
        return dataclasses.replace(
            plain,
            rope_theta=first.rope.theta,
            rope_scaling=first.rope.scaling,
            rope_fraction=first.rope.fraction,
            sliding_window=first.sliding_window,
            experts=first.experts,
        )
    return dataclasses.replace(plain, layers=tuple(layers))


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """The configuration as a JSON object."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values["rope_scaling"] = scaling_to_json(config.rope_scaling)
    values["experts"] = config.experts and dataclasses.asdict(config.experts)
    values["options"] = dict(config.options)
    values["layers"] = [
        {
            "sliding_window": layer.sliding_window,
            "rope": layer.rope
            and {
                "theta": layer.rope.theta,
                "scaling": scaling_to_json(layer.rope.scaling),
                "fraction": layer.rope.fraction,
            },
            "experts": layer.experts and dataclasses.asdict(layer.experts),
        }
        for layer in config.layers
    ]
    return values


def config_from_json(values: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `config_to_json`; fields that are absent are as by default.

    Raises:
        TypeError, ValueError, KeyError, AttributeError: no such configuration.
    """
    fields = dict(values)
    fields["rope_scaling"] = scaling_from_json(fields.get("rope_scaling"))
    fields["experts"] = _experts_from_json(fields.get("experts"))
    fields["options"] = tuple(sorted(dict(fields.get("options") or {}).items()))
    fields["layers"] = tuple(
        LayerSpec(
            layer["sliding_window"],
            layer["rope"]
            and Rope(
                layer["rope"]["theta"],
                scaling_from_json(layer["rope"]["scaling"]),
                layer["rope"].get("fraction", 1.0),
            ),
            _experts_from_json(layer["experts"]),
        )
        for layer in fields.get("layers") or ()
    )
    return ModelConfig(**fields)


def _experts_from_json(values: Mapping[str, Any] | None) -> Experts | None:
    return None if values is None else Experts(**values)
