"""The dense feed-forward block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
from flax import nnx

from pshare_jax.models.blocks.linear import Projection
from pshare_jax.models.config import Activation
from pshare_jax.models.lora import Adapters
from pshare_jax.models.weights import Weights

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def activate(name: Activation, gate: jax.Array) -> jax.Array:
    """The activation of a gate."""
    return jax.nn.silu(gate) if name == "silu" else jax.nn.gelu(gate, approximate=True)


class MLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`: SwiGLU or GeGLU (arXiv 2002.05202)."""

    def __init__(self, path: str, weights: Weights, activation: Activation, backend: str):
        self.gate = Projection(f"{path}.gate", weights, backend)
        self.up = Projection(f"{path}.up", weights, backend)
        self.down = Projection(f"{path}.down", weights, backend)
        self.activation: Activation = activation

    def __call__(
        self, x: Float[Array, "B T embed"], adapters: Adapters | None = None
    ) -> Float[Array, "B T embed"]:
        """`[B, T, embed]` -> `[B, T, embed]`."""
        gate = activate(self.activation, self.gate(x, adapters))
        return self.down(gate * self.up(x, adapters), adapters)
