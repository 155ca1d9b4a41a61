"""The parts of a decoder layer. Each reads its own weights, by name, from the flat dict.

Products of bfloat16 accumulate in float32; results have the dtype of the input. `backend` names the
one that multiplies, see `kernels/matmul`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from pshare_jax.kernels.matmul.api import matmul
from pshare_jax.models.lora import Adapters
from pshare_jax.models.weights import Weights


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation of the last axis (arXiv 1910.07467), in float32."""

    def __init__(self, path: str, weights: Weights, eps: float):
        self.scale = nnx.Param(weights[f"{path}.scale"])
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., N]` -> `[..., N]`."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.eps)
        return (normed * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Projection(nnx.Module):
    """A linear map with kernel `[*in, *out]`, an optional bias `[*out]`, and adapters on top."""

    def __init__(self, path: str, weights: Weights, backend: str, *, input_axes: int = 1):
        self.kernel = nnx.Param(weights[f"{path}.kernel"])
        bias = weights.get(f"{path}.bias")
        self.bias = None if bias is None else nnx.Param(bias)
        self.path = path
        self.backend = backend
        self.input_axes = input_axes

    def __call__(self, x: jax.Array, adapters: Adapters | None = None) -> jax.Array:
        """`[B, T, *in]` -> `[B, T, *out]`; `adapters` add each row's own update."""
        update = None if adapters is None else adapters.update(self.path, x)
        alone = self.bias is None and update is None
        y = matmul(
            x,
            self.kernel[...],
            input_axes=self.input_axes,
            dtype=x.dtype if alone else jnp.float32,
            backend=self.backend,
        )
        if self.bias is not None:
            y += self.bias[...].astype(jnp.float32)
        if update is not None:
            y += update
        return y.astype(x.dtype)


class Embedding(nnx.Module):
    """Token embedding `[vocab, embed]`, which a tied head reads backwards."""

    def __init__(self, path: str, weights: Weights, backend: str):
        self.embedding = nnx.Param(weights[f"{path}.embedding"])
        self.backend = backend

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """`[...]` int32 -> `[..., embed]`; ids out of range are clipped."""
        return jnp.take(self.embedding[...], tokens, axis=0, mode="clip")

    def logits(self, x: jax.Array) -> jax.Array:
        """`[..., embed]` -> `[..., vocab]` float32: the similarity to every token's embedding."""
        return matmul(x, self.embedding[...], transposed=True, backend=self.backend)


class MLP(nnx.Module):
    """The gated feed-forward block: `down(silu(gate(x)) * up(x))` (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, path: str, weights: Weights, backend: str):
        self.gate = Projection(f"{path}.gate", weights, backend)
        self.up = Projection(f"{path}.up", weights, backend)
        self.down = Projection(f"{path}.down", weights, backend)

    def __call__(self, x: jax.Array, adapters: Adapters | None = None) -> jax.Array:
        """`[B, T, embed]` -> `[B, T, embed]`."""
        return self.down(jax.nn.silu(self.gate(x, adapters)) * self.up(x, adapters), adapters)
