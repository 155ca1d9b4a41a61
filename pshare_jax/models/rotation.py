"""Rotating queries and keys by their positions; see `rope.py` for what by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pshare_jax.models.rope import Rope, rope_frequencies

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

RopeTable = tuple[jax.Array, jax.Array]
"""Cosine and sine of every angle, each `[B, T, 1, R / 2]` float32, where R components of a head
rotate: all of them, or the first."""


def rope_table(rope: Rope, head_dim: int, positions: Int[Array, "*batch T"]) -> RopeTable:
    """Cosine and sine of every angle, times the attention factor, for positions `[B, T]`.

    One table serves all layers of a forward pass that rotate alike.
    """
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(rope, head_dim)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.scaling is None or rope.scaling.attention_factor == 1.0:
        return cos, sin
    return cos * rope.scaling.attention_factor, sin * rope.scaling.attention_factor


def unrotated(head_dim: int, positions: Int[Array, "*batch T"]) -> RopeTable:
    """The table of no rotation at all, for positions `[B, T]`."""
    shape = (*positions.shape, 1, head_dim // 2)
    return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)


def apply_rope(
    x: Float[Array, "*batch T heads head_dim"], table: RopeTable
) -> Float[Array, "*batch T heads head_dim"]:
    """Rotates `x [B, T, heads, head_dim]` by `table`, in float32; the dtype of x is kept.

    Component i of the first half of what rotates is paired with component i of the second half.
    """
    cos, sin = table
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    first, second = wide[..., :half], wide[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x.shape[-1]:
        parts.append(wide[..., 2 * half :])
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)
