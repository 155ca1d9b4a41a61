"""A feed-forward block with experts: a router, and the few experts that it chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from pshare_jax.kernels.experts.api import experts
from pshare_jax.kernels.experts.gating import Biases
from pshare_jax.kernels.matmul.api import matmul
from pshare_jax.models.config import Experts
from pshare_jax.models.weights import Weights

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@dataclass(frozen=True)
class ExpertsBackend:
    """Which backend of `kernels/experts` computes, and the mesh that it splits its work over."""

    name: str = "ragged_dot"
    mesh: Mesh | None = None


class Kernel(nnx.Module):
    """One weight of a block, with its bias if it has one."""

    def __init__(self, path: str, weights: Weights):
        self.kernel = nnx.Param(weights[f"{path}.kernel"])
        bias = weights.get(f"{path}.bias")
        self.bias = None if bias is None else nnx.Param(bias)


class ExpertsMLP(nnx.Module):
    """Each token's sum of the experts of the highest scores, weighted by their softmax."""

    def __init__(self, path: str, weights: Weights, about: Experts, backend: ExpertsBackend):
        self.router = Kernel(f"{path}.router", weights)
        self.gate = Kernel(f"{path}.gate", weights)
        self.up = Kernel(f"{path}.up", weights)
        self.down = Kernel(f"{path}.down", weights)
        self.about = about
        self.backend = backend

    def __call__(self, x: Float[Array, "B T embed"]) -> Float[Array, "B T embed"]:
        """`[B, T, embed]` -> `[B, T, embed]`."""
        B, T, E = x.shape
        flat = x.reshape(B * T, E)
        scores = matmul(flat, self.router.kernel[...], dtype=jnp.float32)
        if self.router.bias is not None:
            scores += self.router.bias[...].astype(jnp.float32)
        scores = jax.nn.softmax(scores)
        weights, chosen = jax.lax.top_k(scores, self.about.per_token)
        if self.about.normalised:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        out = experts(
            flat,
            weights,
            chosen,
            self.gate.kernel[...],
            self.up.kernel[...],
            self.down.kernel[...],
            biases=self._biases(),
            limit=self.about.limit,
            mesh=self.backend.mesh,
            backend=self.backend.name,
        )
        return out.reshape(B, T, E)

    def _biases(self) -> Biases | None:
        kernels = (self.gate, self.up, self.down)
        biases = [kernel.bias[...] for kernel in kernels if kernel.bias is not None]
        return Biases(*biases) if biases else None
