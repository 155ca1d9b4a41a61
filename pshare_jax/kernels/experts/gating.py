"""What the gate of an expert makes of its hidden units."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

SHARPNESS = 1.702
"""Of the bounded gate's sigmoid."""


class Biases(NamedTuple):
    """Biases of the experts' products: gate and up `[X, mlp]`, down `[X, embed]`."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


def gated(gate: jax.Array, up: jax.Array, limit: float | None) -> jax.Array:
    """`silu(gate) * up`; with a limit, as in gpt-oss (arXiv 2508.10925), both are bounded by it,
    the sigmoid is sharper, and 1 is added to `up`."""
    if limit is None:
        return jax.nn.silu(gate) * up
    gate = jnp.minimum(gate, limit)
    return gate * jax.nn.sigmoid(SHARPNESS * gate) * (jnp.clip(up, -limit, limit) + 1.0)
