"""Typed reading of a Hugging Face `config.json`; errors name the field."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from pshare_jax.errors import CheckpointError
from pshare_jax.models.rope import (
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    YarnRopeScaling,
    yarn_attention_factor,
)

T = TypeVar("T")


class Fields:
    """The fields of a JSON object.

    Args:
        values: the object.
        where: what stands before a field's name in messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str = ""):
        self.values = values
        self._where = where

    def fail(self, field: str, problem: str) -> CheckpointError:
        """An error about a field."""
        return CheckpointError(f"config.json: {self._where}{field} {problem}")

    def has(self, field: str) -> bool:
        """Whether the field is there, null or not."""
        return field in self.values

    def get(self, field: str, kind: type[T], default: T | None = None) -> T:
        """Field `field`; `default` stands for one that is absent or null.

        Integers pass for floats, booleans for neither.

        Raises:
            CheckpointError: absent without a default, or of another type.
        """
        value = self.values.get(field)
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
        """Like `get`, of a number that must be positive and finite."""
        value = self.get(field, kind, default)
        if not 0 < value < math.inf:  # type: ignore[operator]
            raise self.fail(field, f"is {value!r}, but must be positive")
        return value

    def optional(self, field: str, kind: type[T], default: T | None = None) -> T | None:
        """Like `positive`, of a number that null turns off; `default` stands for an absent one."""
        if self.has(field) and self.values[field] is None:
            return None
        return default if not self.has(field) else self.positive(field, kind)

    def only(self, field: str, *supported: Any) -> None:
        """Refuses a field that is there with any other value than those."""
        value = self.values.get(field)
        if value is not None and value not in supported:
            shown = reprlib.repr(value)
            names = " and ".join(repr(s) for s in supported)
            verb = "is" if len(supported) == 1 else "are"
            raise self.fail(field, f"is {shown}; only {names} {verb} supported")

    def part(self, field: str) -> Fields:
        """The object in field `field`; an empty one if it is absent or null."""
        value = self.values.get(field) or {}
        if not isinstance(value, Mapping):
            raise self.fail(field, f"is {reprlib.repr(value)}, but must be an object")
        return Fields(value, f"{self._where}{field}.")

    def having(self, values: Mapping[str, Any]) -> Fields:
        """Other values at the same place."""
        return Fields(values, self._where)

    def choices(self, field: str, length: int, possible: tuple[str, ...]) -> list[str] | None:
        """A list of `length` of the words `possible`, such as `layer_types`; None if absent."""
        value = self.values.get(field)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length:
            raise self.fail(field, f"is {reprlib.repr(value)}, but must name all {length} layers")
        for entry in value:
            if entry not in possible:
                raise self.fail(
                    field, f"has {reprlib.repr(entry)}; supported are {', '.join(possible)}"
                )
        return value


def read_rope(fields: Fields, default_theta: float = 10000.0) -> Rope:
    """The rotary embedding of a model that has one: as transformers 4 and 5 write it.

    Raises:
        CheckpointError: names the field that is missing or not supported.
    """
    rope = _rope_part(fields)
    return rope_of(rope, fields, fields.positive("rope_theta", float, default_theta))


def read_partial_rope(fields: Fields, head_dim: int, default_theta: float = 10000.0) -> Rope:
    """The same where a part of each head may rotate (`partial_rotary_factor`)."""
    rope = _rope_part(fields)
    where = rope if rope.values.get("partial_rotary_factor") is not None else fields
    fraction = where.positive("partial_rotary_factor", float, 1.0)
    rotated = int(head_dim * fraction)
    if not 2 <= rotated <= head_dim or rotated % 2:
        raise where.fail(
            "partial_rotary_factor",
            f"is {fraction:g}: {rotated} of a head's {head_dim} components cannot rotate in pairs",
        )
    whole = {k: v for k, v in rope.values.items() if k != "partial_rotary_factor"}
    theta = fields.positive("rope_theta", float, default_theta)
    return replace(rope_of(rope.having(whole), fields, theta), fraction=fraction)


def rope_of(rope: Fields, fields: Fields, default_theta: float) -> Rope:
    """The rotary embedding that the object `rope` of a configuration describes."""
    theta = rope.positive("rope_theta", float, default_theta)
    rope.only("partial_rotary_factor", 1.0)
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    readers = {
        "default": lambda *_: None,
        "llama3": _llama3,
        "linear": lambda rope, _: LinearRopeScaling(rope.positive("factor", float)),
        "yarn": _yarn,
        # Beyond `max_position_embeddings` its frequencies depend on the length of the whole
        # sequence, which KV that many prompts share cannot: up to there they are the plain ones.
        "dynamic": _dynamic,
        "longrope": _longrope,
        "su": _longrope,
    }
    if kind not in readers:
        raise rope.fail("rope_type", f"is {kind!r}; supported are {', '.join(readers)}")
    return Rope(theta, readers[kind](rope, fields))


def longest_context(fields: Fields, default: int) -> int:
    """`max_position_embeddings`, or what the list of factors that is used was made for.

    LongRoPE has one list for sequences up to a length, another for longer ones. KV that prompts of
    all lengths share is rotated by one of them: the short one, unless `with_long_factors` was
    asked for.
    """
    longest = fields.positive("max_position_embeddings", int, default)
    rope = _rope_part(fields)
    if rope.values.get("short_factor") == rope.values.get("long_factor"):
        return longest
    return min(longest, _original_context(rope, fields))


def with_long_factors(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """A `config.json` whose LongRoPE uses the factors for long contexts at all lengths.

    So does vLLM where `max_model_len` is beyond the original context.
    """
    changed = dict(hf)
    for name in ("rope_parameters", "rope_scaling"):
        rope = hf.get(name)
        if isinstance(rope, Mapping) and "long_factor" in rope:
            changed[name] = {**rope, "short_factor": rope["long_factor"]}
    return changed


def _rope_part(fields: Fields) -> Fields:
    return fields.part(
        "rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling"
    )


def _original_context(rope: Fields, fields: Fields) -> int:
    # One beside the rope parameters comes first, as in transformers.
    where = fields if fields.values.get("original_max_position_embeddings") else rope
    longest = fields.values.get("max_position_embeddings")
    return where.positive("original_max_position_embeddings", int, longest)


def _longrope(rope: Fields, fields: Fields) -> RopeScaling:
    original = _original_context(rope, fields)
    factor = rope.optional("factor", float)
    if factor is None:
        factor = fields.positive("max_position_embeddings", int, original) / original
    stated = rope.optional("attention_factor", float)
    implied = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    for name in ("short_factor", "long_factor"):
        values = rope.get(name, list)
        if not all(type(value) in (int, float) and 0 < value < math.inf for value in values):
            raise rope.fail(name, f"is {reprlib.repr(values)}, but must hold positive numbers")
    factors = tuple(map(float, rope.values["short_factor"]))
    return LongRopeScaling(factors, stated or implied, original)


def _llama3(rope: Fields, fields: Fields) -> RopeScaling:
    return Llama3RopeScaling(
        factor=rope.positive("factor", float),
        low_freq_factor=rope.positive("low_freq_factor", float),
        high_freq_factor=rope.positive("high_freq_factor", float),
        original_max_position_embeddings=rope.positive("original_max_position_embeddings", int),
    )


def _dynamic(rope: Fields, fields: Fields) -> None:
    rope.positive("factor", float)


def _yarn(rope: Fields, fields: Fields) -> RopeScaling:
    if not rope.has("factor"):
        raise rope.fail("factor", "is missing")
    original = _original_context(rope, fields)
    factor = (
        rope.optional("factor", float) or fields.positive("max_position_embeddings", int) / original
    )
    mscale = rope.optional("mscale", float)
    mscale_all_dim = rope.optional("mscale_all_dim", float)
    stated = rope.optional("attention_factor", float)
    return YarnRopeScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=stated or yarn_attention_factor(factor, mscale, mscale_all_dim),
        beta_fast=rope.positive("beta_fast", float, 32.0),
        beta_slow=rope.positive("beta_slow", float, 1.0),
        truncate=rope.get("truncate", bool, True),
    )


def rope_to_hf(scaling: RopeScaling | None) -> dict[str, object] | None:
    """A scaling as transformers writes it in `rope_scaling`; None for none."""
    if scaling is None:
        return None
    values = dataclasses.asdict(scaling)
    if isinstance(scaling, LongRopeScaling):
        factors = list(values.pop("factors"))
        values |= {"short_factor": factors, "long_factor": factors}
    return {"rope_type": scaling.rope_type, **values}
