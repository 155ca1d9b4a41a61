"""Norms, linear maps and embeddings. Each reads its own weights, by name, from the flat dict.

Products of bfloat16 accumulate in float32; results have the dtype of the input. `backend` names the
one that multiplies, see `kernels/matmul`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from pshare_jax.kernels.matmul.api import lora_matmul, matmul
from pshare_jax.kernels.matmul.rounded import rounded_matmul
from pshare_jax.models.lora import Adapters, OneAdapter
from pshare_jax.models.weights import SCALE, Weights

if TYPE_CHECKING:
    from jaxtyping import Array, Float

ROUNDED = "rounded"
"""The backend of weights of 8 bits that multiply rounded activations."""


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (arXiv 1910.07467) of the axes that `scale` has, in float32.

    With `adds_one` the factor is 1 + scale.
    """

    def __init__(self, path: str, weights: Weights, eps: float, *, adds_one: bool = False):
        self.scale = nnx.Param(weights[f"{path}.scale"])
        self.eps = eps
        self.adds_one = adds_one

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """`[..., *N]` -> `[..., *N]`, where scale is `[*N]`."""
        wide = x.astype(jnp.float32)
        scale = self.scale[...].astype(jnp.float32)
        axes = tuple(range(-scale.ndim, 0))
        mean_square = jnp.mean(jnp.square(wide), axis=axes, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.eps)
        return (normed * (1.0 + scale if self.adds_one else scale)).astype(x.dtype)


class Projection(nnx.Module):
    """A linear map with kernel `[*in, *out]`, an optional bias `[*out]`, and adapters on top.

    A kernel of 8 bits has scales `[*out]`.
    """

    def __init__(self, path: str, weights: Weights, backend: str, *, input_axes: int = 1):
        self.kernel = nnx.Param(weights[f"{path}.kernel"])
        scale = weights.get(f"{path}.kernel{SCALE}")
        self.kernel_scale = None if scale is None else nnx.Param(scale)
        bias = weights.get(f"{path}.bias")
        self.bias = None if bias is None else nnx.Param(bias)
        self.path = path
        self.backend = backend
        self.input_axes = input_axes

    def __call__(self, x: jax.Array, adapters: Adapters | None = None) -> jax.Array:
        """`[B, T, *in]` -> `[B, T, *out]`; `adapters` add each row's own update."""
        own = None
        if isinstance(adapters, OneAdapter) and self.kernel_scale is None:
            own, adapters = adapters.factors(self.path), None
        update = None if adapters is None else adapters.update(self.path, x)
        alone = self.bias is None and update is None
        dtype = x.dtype if alone else jnp.float32
        y = self.product(x, dtype) if own is None else self._updated(x, *own, dtype)
        if self.bias is not None:
            y += self.bias[...].astype(jnp.float32)
        if update is not None:
            y += update
        return y.astype(x.dtype)

    def _updated(self, x: jax.Array, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
        """`product` with the update `a b` of the kernel."""
        return lora_matmul(
            x,
            self.kernel[...],
            a,
            b,
            input_axes=self.input_axes,
            dtype=dtype,
            backend=self.backend,
        )

    def product(self, x: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        """`[..., *in]` -> `[..., *out]` of `dtype`, without bias and adapters."""
        scale = self.kernel_scale
        if self.backend == ROUNDED:
            assert scale is not None
            axes = self.input_axes
            return rounded_matmul(x, self.kernel[...], scale[...], input_axes=axes, dtype=dtype)
        y = matmul(
            x,
            self.kernel[...],
            input_axes=self.input_axes,
            dtype=dtype if scale is None else jnp.float32,
            backend=self.backend,
        )
        return y if scale is None else (y * scale[...]).astype(dtype)


class Embedding(nnx.Module):
    """Token embedding `[vocab, embed]`, which a tied head reads backwards.

    One of whole numbers has scales `[vocab]`; `dtype` is what it is looked up in.
    """

    def __init__(self, path: str, weights: Weights, backend: str, dtype: Any):
        self.embedding = nnx.Param(weights[f"{path}.embedding"])
        scale = weights.get(f"{path}.embedding{SCALE}")
        self.embedding_scale = None if scale is None else nnx.Param(scale)
        self.backend = backend
        self.dtype = dtype

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """`[...]` int32 -> `[..., embed]`; ids out of range are clipped."""
        found = jnp.take(self.embedding[...], tokens, axis=0, mode="clip")
        if self.embedding_scale is None:
            return found
        scale = jnp.take(self.embedding_scale[...], tokens, mode="clip")
        return (found.astype(jnp.float32) * scale[..., None]).astype(self.dtype)

    def logits(self, x: jax.Array) -> jax.Array:
        """`[..., embed]` -> `[..., vocab]` float32: the similarity to every token's embedding."""
        if (scale := self.embedding_scale) is not None:
            return rounded_matmul(x, self.embedding[...], scale[...], transposed=True)
        return matmul(x, self.embedding[...], transposed=True, backend=self.backend)
