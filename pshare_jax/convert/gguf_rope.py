"""How a GGUF file says that rotary embeddings are scaled: in metadata, or as lists of factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pshare_jax.convert.gguf_metadata import Metadata, stated_rope_scaling
from pshare_jax.errors import CheckpointError
from pshare_jax.models.rope import Llama3RopeScaling, LongRopeScaling, RopeScaling

ROPE_FACTORS = "rope_freqs.weight"
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
FACTOR_TENSORS = (ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS)

LLAMA3_BAND = (1.0, 4.0, 8192)
"""Of every published `llama3` scaling: GGUF stores the resulting factors, not these numbers."""


class _File(Protocol):
    path: Path

    def get(self, key: str, kind: type, default: Any = None) -> Any: ...

    def has_tensor(self, name: str) -> bool: ...

    def vector(self, name: str) -> np.ndarray: ...


def rope_scaling(
    file: _File, metadata: Metadata, rotated: int, theta: float, *, long_context: bool
) -> RopeScaling | None:
    """The scaling of a file; None for none.

    Args:
        file: the file.
        metadata: its hyper-parameters.
        rotated: how many components of a head rotate.
        theta: base of the wavelengths.
        long_context: of LongRoPE's two lists, take that for long contexts.

    Raises:
        CheckpointError: names the metadata or tensor that is not supported.
    """
    if file.has_tensor(SHORT_FACTORS) or file.has_tensor(LONG_FACTORS):
        return _longrope(file, metadata, rotated, long_context)
    stated = stated_rope_scaling(metadata)
    if not file.has_tensor(ROPE_FACTORS):
        return stated
    if stated is not None:
        raise CheckpointError(
            f"{file.path}: tensor {ROPE_FACTORS} and rope.scaling.type {stated.rope_type!r}: "
            "two scalings at once are not supported"
        )
    factors = _factors(file, ROPE_FACTORS, rotated)
    llama3 = Llama3RopeScaling(float(factors.max()), *LLAMA3_BAND)
    if np.allclose(factors, rope_factors(llama3, rotated, theta), rtol=1e-4):
        return llama3
    # Whatever they were made by: frequencies divided one by one are all that is computed.
    return LongRopeScaling(tuple(map(float, factors)), 1.0, metadata.size("context_length"))


def _longrope(file: _File, metadata: Metadata, rotated: int, long_context: bool) -> LongRopeScaling:
    if (kind := metadata.optional("rope.scaling.type", str, "longrope")) not in (
        "longrope",
        "none",
    ):
        raise metadata.fail("rope.scaling.type", f"is {kind!r}, but there are LongRoPE's factors")
    if file.has_tensor(ROPE_FACTORS):
        raise CheckpointError(f"{file.path}: tensor {ROPE_FACTORS} beside LongRoPE's factors")
    for name in (SHORT_FACTORS, LONG_FACTORS):
        if not file.has_tensor(name):
            raise CheckpointError(f"{file.path}: tensor {name} is missing")
    factors = _factors(file, LONG_FACTORS if long_context else SHORT_FACTORS, rotated)
    longest = metadata.size("context_length")
    return LongRopeScaling(
        # The shortest decimals of what is stored, as in a `config.json`.
        tuple(float(str(factor)) for factor in factors),
        metadata.number("rope.scaling.attn_factor", 1.0),
        metadata.size("rope.scaling.original_context_length", longest),
    )


def _factors(file: _File, name: str, rotated: int) -> np.ndarray:
    factors = file.vector(name)
    if factors.shape != (rotated // 2,):
        raise CheckpointError(
            f"{file.path}: tensor {name}: unknown scaling: has shape {list(factors.shape)}, but "
            f"{rotated // 2} components of a head rotate"
        )
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise CheckpointError(f"{file.path}: tensor {name}: holds no positive factors")
    return factors


def rope_factors(scaling: Llama3RopeScaling, head_dim: int, theta: float) -> np.ndarray:
    """By how much Llama 3.1's scaling divides each of the `head_dim / 2` frequencies, float32."""
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * np.pi / frequencies
    low = scaling.original_max_position_embeddings / scaling.low_freq_factor
    high = scaling.original_max_position_embeddings / scaling.high_freq_factor
    smooth = (scaling.original_max_position_embeddings / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    medium = 1 / ((1 - smooth) / scaling.factor + smooth)
    factors = np.where(wavelengths > low, scaling.factor, np.where(wavelengths < high, 1.0, medium))
    return factors.astype(np.float32)
