"""Hugging Face's `config.json` -> `ModelConfig` and back.

Reads what transformers 4 writes (`rope_theta`, `rope_scaling`) and what transformers 5 writes
(`rope_parameters`). A field that is absent has transformers' default for its architecture. A value
that the decoder cannot compute is an error here rather than wrong logits later.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pshare_jax.errors import CheckpointError
from pshare_jax.models.config import (
    MAX_LAYERS,
    Architecture,
    Llama3RopeScaling,
    ModelConfig,
)

T = TypeVar("T")


@dataclass(frozen=True)
class _Family:
    """What an architecture implies: its names, and transformers' defaults for absent fields."""

    architecture: Architecture
    hf_architecture: str
    max_position_embeddings: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    sliding_window: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False


_FAMILIES = (
    _Family("llama", "LlamaForCausalLM", 2048),
    _Family("mistral", "MistralForCausalLM", 131072, num_kv_heads=8, sliding_window=4096),
    _Family("qwen2", "Qwen2ForCausalLM", 32768, num_kv_heads=32, qkv_bias=True),
    _Family("qwen3", "Qwen3ForCausalLM", 32768, num_kv_heads=32, head_dim=128, qk_norm=True),
)
_BY_HF_NAME = {family.hf_architecture: family for family in _FAMILIES}
_BY_NAME = {family.architecture: family for family in _FAMILIES}

_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}
"""Fields with the only value that is supported; transformers' default for each."""


class _Fields:
    """Typed reading of a JSON object; errors name the field."""

    def __init__(self, values: Mapping[str, Any], where: str = ""):
        self._values = values
        self._where = where

    def fail(self, field: str, problem: str) -> CheckpointError:
        return CheckpointError(f"config.json: {self._where}{field} {problem}")

    def get(self, field: str, kind: type[T], default: T | None = None) -> T:
        """Field `field`; `default` stands for one that is absent or null.

        Integers pass for floats, booleans for neither.
        """
        value = self._values.get(field)
        if value is None:
            if default is None:
                raise self.fail(field, "is missing")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            shown = reprlib.repr(value)
            raise self.fail(field, f"is {shown}, but must be of type {kind.__name__}")
        return value

    def positive(self, field: str, kind: type[T], default: T | None = None) -> T:
        value = self.get(field, kind, default)
        if not 0 < value < math.inf:  # type: ignore[operator]
            raise self.fail(field, f"is {value!r}, but must be positive")
        return value

    def only(self, field: str, supported: Any) -> None:
        value = self._values.get(field)
        if value is not None and value != supported:
            shown = reprlib.repr(value)
            raise self.fail(field, f"is {shown}; only {supported!r} is supported")

    def has(self, field: str) -> bool:
        return field in self._values


def _family(hf: Mapping[str, Any]) -> _Family:
    names = hf.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if (family := _BY_HF_NAME.get(name)) is None:  # type: ignore[arg-type]
        raise CheckpointError(
            f"config.json: architectures is {reprlib.repr(names)}; supported are "
            f"{', '.join(_BY_HF_NAME)}"
        )
    return family


def _rope(hf: Mapping[str, Any], fields: _Fields) -> tuple[float, Llama3RopeScaling | None]:
    name = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    raw = hf.get(name) or {}
    if not isinstance(raw, Mapping):
        raise fields.fail(name, f"is {reprlib.repr(raw)}, but must be an object")
    rope = _Fields(raw, f"{name}.")
    theta = rope.positive("rope_theta", float, fields.positive("rope_theta", float, 10000.0))
    rope.only("partial_rotary_factor", 1.0)
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise rope.fail("rope_type", f"is {kind!r}; supported are 'default' and 'llama3'")
    return theta, Llama3RopeScaling(
        factor=rope.positive("factor", float),
        low_freq_factor=rope.positive("low_freq_factor", float),
        high_freq_factor=rope.positive("high_freq_factor", float),
        original_max_position_embeddings=rope.positive("original_max_position_embeddings", int),
    )


def _sliding_window(
    hf: Mapping[str, Any], fields: _Fields, family: _Family, num_layers: int
) -> int | None:
    """The window of all layers; layers that differ from each other are not supported."""
    if family.architecture == "llama":
        return None
    if family.architecture == "mistral":
        if fields.has("sliding_window") and hf["sliding_window"] is None:
            return None
        return fields.positive("sliding_window", int, family.sliding_window)
    if not fields.get("use_sliding_window", bool, False):
        return None
    first = fields.get("max_window_layers", int, 28)
    default = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    kinds = set(fields.get("layer_types", list, default))
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        field = "layer_types" if fields.has("layer_types") else "max_window_layers"
        raise fields.fail(field, "mixes full and sliding attention, which is not supported")
    return fields.positive("sliding_window", int, 4096)


def _check_not_quantised(hf: Mapping[str, Any], fields: _Fields) -> None:
    about = hf.get("quantization_config")
    if about is None:
        return
    method = about.get("quant_method") if isinstance(about, Mapping) else None
    raise fields.fail(
        "quantization_config",
        f"says that the weights are quantised (quant_method {reprlib.repr(method)}), which is not "
        "supported; convert the model that was quantised, or a GGUF file of it",
    )


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The decoder that a Hugging Face `config.json` (parsed) describes.

    Raises:
        CheckpointError: names the field that is missing, of the wrong type or not supported.
    """
    family = _family(hf)
    fields = _Fields(hf)
    for field, supported in _ONLY.items():
        fields.only(field, supported)
    _check_not_quantised(hf, fields)
    hidden_size = fields.positive("hidden_size", int)
    num_heads = fields.positive("num_attention_heads", int)
    # An explicit null means one KV head a query head; absence means the architecture's default.
    absent = None if fields.has("num_key_value_heads") else family.num_kv_heads
    num_kv_heads = fields.positive("num_key_value_heads", int, absent or num_heads)
    absent = None if fields.has("head_dim") else family.head_dim
    head_dim = fields.positive("head_dim", int, absent or max(hidden_size // num_heads, 1))
    if num_heads % num_kv_heads:
        raise fields.fail(
            "num_attention_heads", f"({num_heads}) is no multiple of {num_kv_heads} KV heads"
        )
    if head_dim % 2:
        raise fields.fail("head_dim", f"is {head_dim}, but must be even")
    num_layers = fields.positive("num_hidden_layers", int)
    if num_layers > MAX_LAYERS:
        raise fields.fail(
            "num_hidden_layers", f"is {num_layers}; at most {MAX_LAYERS} are possible"
        )
    rope_theta, rope_scaling = _rope(hf, fields)
    return ModelConfig(
        architecture=family.architecture,
        vocab_size=fields.positive("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=fields.positive("intermediate_size", int),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rms_norm_eps=fields.positive("rms_norm_eps", float, 1e-6),
        max_position_embeddings=fields.positive(
            "max_position_embeddings", int, family.max_position_embeddings
        ),
        tie_word_embeddings=fields.get("tie_word_embeddings", bool, False),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        sliding_window=_sliding_window(hf, fields, family, num_layers),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` that transformers 4 and 5 load as this decoder.

    Token ids and the dtype are not part of `ModelConfig`: the caller adds them.

    Raises:
        CheckpointError: names a field that the Hugging Face architecture cannot express.
    """
    hf: dict[str, Any] = {
        "architectures": [_BY_NAME[config.architecture].hf_architecture],
        "model_type": config.architecture,
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
        "rope_theta": config.rope_theta,
    }
    if config.rope_scaling is not None:
        hf["rope_scaling"] = {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
    if config.architecture == "mistral":
        hf["sliding_window"] = config.sliding_window
    elif config.sliding_window is not None:
        hf |= {
            "sliding_window": config.sliding_window,
            "use_sliding_window": True,
            "max_window_layers": 0,
        }
    back = config_from_hf(hf)
    for field in dataclasses.fields(ModelConfig):
        if getattr(back, field.name) != getattr(config, field.name):
            raise CheckpointError(
                f"{field.name}={getattr(config, field.name)!r} cannot be expressed in the "
                f"config.json of a {hf['architectures'][0]}"
            )
    return hf
