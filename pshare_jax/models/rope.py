"""Which rotary position embedding (Su et al., arXiv 2104.09864) a model has, stretched or not.

A scaling changes the frequencies, and some the size of what is rotated, as transformers computes
them. None depends on a sequence's length: a key is rotated once, by its position, and stays valid
in the cache whatever comes after it. Rotating is done by `rotation.py`: facts need no JAX.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's frequency scaling (arXiv 2407.21783); lengths in tokens.

    Wavelengths that fit `high_freq_factor` times into the original context stay, those that fit
    less than `low_freq_factor` times grow by `factor`, those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    rope_type: ClassVar[str] = "llama3"
    attention_factor: ClassVar[float] = 1.0

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        """See `rope_frequencies`; float64."""
        frequencies = _plain(theta, head_dim)
        turns = self.original_max_position_embeddings * frequencies / (2 * np.pi)
        band = self.high_freq_factor - self.low_freq_factor
        keep = np.clip((turns - self.low_freq_factor) / band, 0.0, 1.0)
        return frequencies * (keep + (1.0 - keep) / self.factor)


@dataclass(frozen=True)
class LinearRopeScaling:
    """Positions divided by `factor` (arXiv 2306.15595)."""

    factor: float

    rope_type: ClassVar[str] = "linear"
    attention_factor: ClassVar[float] = 1.0

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        """See `rope_frequencies`; float64."""
        return _plain(theta, head_dim) / self.factor


@dataclass(frozen=True)
class YarnRopeScaling:
    """YaRN (arXiv 2309.00071).

    Args:
        factor: what long wavelengths grow by.
        original_max_position_embeddings: tokens of the context before.
        attention_factor: what rotated queries and keys are multiplied by.
        beta_fast: turns within the original context from which on frequencies stay.
        beta_slow: turns below which they are divided by `factor`.
        truncate: whether the band between is widened to whole components.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    rope_type: ClassVar[str] = "yarn"

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        """See `rope_frequencies`; float64."""
        low, high = (self._component(b, theta, head_dim) for b in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        width = high - low or 0.001
        stretched = np.clip((np.arange(head_dim // 2) - low) / width, 0.0, 1.0)
        return _plain(theta, head_dim) * (1.0 - stretched + stretched / self.factor)

    def _component(self, turns: float, theta: float, head_dim: int) -> float:
        """Which component turns so often within the original context."""
        original = self.original_max_position_embeddings
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))


@dataclass(frozen=True)
class LongRopeScaling:
    """Frequencies divided one by one: LongRoPE (arXiv 2402.13753), with one of its two lists.

    Args:
        factors: what each component's frequency is divided by.
        attention_factor: what rotated queries and keys are multiplied by.
        original_max_position_embeddings: tokens of the context before.
    """

    factors: tuple[float, ...]
    attention_factor: float
    original_max_position_embeddings: int

    rope_type: ClassVar[str] = "longrope"

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        """See `rope_frequencies`; float64."""
        return _plain(theta, head_dim) / np.asarray(self.factors)


RopeScaling = Llama3RopeScaling | LinearRopeScaling | YarnRopeScaling | LongRopeScaling

_SCALINGS: dict[str, type[RopeScaling]] = {
    scaling.rope_type: scaling
    for scaling in (Llama3RopeScaling, LinearRopeScaling, YarnRopeScaling, LongRopeScaling)
}


@dataclass(frozen=True)
class Rope:
    """One rotary embedding.

    Args:
        theta: base of its wavelengths.
        scaling: how they are changed.
        fraction: what part of a head rotates, its first components; the others stay.
    """

    theta: float = 10000.0
    scaling: RopeScaling | None = None
    fraction: float = 1.0

    def rotated(self, head_dim: int) -> int:
        """How many components of a head rotate."""
        return int(head_dim * self.fraction)


def scaling_to_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """A scaling as a JSON object; `rope_type` tells which, and is absent for Llama 3.1's."""
    if scaling is None:
        return None
    values = dataclasses.asdict(scaling)
    if isinstance(scaling, Llama3RopeScaling):
        return values
    return {"rope_type": scaling.rope_type, **values}


def scaling_from_json(values: Mapping[str, Any] | None) -> RopeScaling | None:
    """The inverse of `scaling_to_json`.

    Raises:
        TypeError, KeyError: no such scaling.
    """
    if values is None:
        return None
    fields: dict[str, Any] = dict(values)
    if "factors" in fields:
        fields["factors"] = tuple(fields["factors"])
    return _SCALINGS[fields.pop("rope_type", Llama3RopeScaling.rope_type)](**fields)


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """YaRN's attention factor where a checkpoint does not state it."""

    def of(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return of(mscale) / of(mscale_all_dim) if mscale and mscale_all_dim else of(1.0)


def _plain(theta: float, head_dim: int) -> np.ndarray:
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    return theta**-exponents


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angular frequencies, `[R / 2]` float32, radians a position; see `rotation.RopeTable`."""
    rotated = rope.rotated(head_dim)
    if rope.scaling is None:
        return _plain(rope.theta, rotated).astype(np.float32)
    return rope.scaling.frequencies(rope.theta, rotated).astype(np.float32)
