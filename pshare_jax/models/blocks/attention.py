"""Projections around attention, which itself is wherever KV lives."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from pshare_jax.models.attention import AttentionIO
from pshare_jax.models.blocks.linear import Projection, RMSNorm
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.lora import Adapters
from pshare_jax.models.rope import Rope
from pshare_jax.models.rotation import RopeTable, apply_rope
from pshare_jax.models.weights import Weights

RopeTables = Mapping[Rope, RopeTable]
"""The tables of a forward pass, of which a layer takes its own."""


def query_factor(config: ModelConfig) -> float:
    """What queries are multiplied by, since `AttentionIO` divides scores by sqrt(head_dim)."""
    scale = config.query_scale
    return 1.0 if scale is None else scale * math.sqrt(config.head_dim)


class Attention(nnx.Module):
    """Projections around an `AttentionIO`; with qk-norm, heads are normalised before rotation."""

    def __init__(self, path: str, weights: Weights, config: ModelConfig, layer: int, backend: str):
        self.q = Projection(f"{path}.q", weights, backend)
        self.k = Projection(f"{path}.k", weights, backend)
        self.v = Projection(f"{path}.v", weights, backend)
        self.o = Projection(f"{path}.o", weights, backend, input_axes=2)

        def norm(name: str) -> RMSNorm | None:
            eps, adds_one = config.rms_norm_eps, config.norm_adds_one
            if not config.qk_norm:
                return None
            return RMSNorm(f"{path}.{name}", weights, eps, adds_one=adds_one)

        self.q_norm = norm("q_norm")
        self.k_norm = norm("k_norm")
        self.sinks = nnx.Param(weights[f"{path}.sinks"]) if config.attention_sinks else None
        self.layer = layer
        self.rope = config.layer(layer).rope
        self.query_factor = query_factor(config)

    def kv(
        self, x: jax.Array, ropes: RopeTables, adapters: Adapters | None
    ) -> tuple[jax.Array, jax.Array]:
        """Rotated keys and values of `x [B, T, embed]`, each `[B, T, kv_heads, head_dim]`."""
        k = self.k(x, adapters)
        if self.k_norm is not None:
            k = self.k_norm(k)
        return self._rotated(k, ropes), self.v(x, adapters)

    def __call__(
        self, x: jax.Array, ropes: RopeTables, attention: AttentionIO, adapters: Adapters | None
    ) -> jax.Array:
        """`[B, T, embed]` -> `[B, T, embed]`."""
        q = self.q(x, adapters)
        if self.q_norm is not None:
            q = self.q_norm(q)
        q = self._rotated(q, ropes)
        if self.query_factor != 1.0:
            q = (q.astype(jnp.float32) * self.query_factor).astype(q.dtype)
        k, v = self.kv(x, ropes, adapters)
        sinks = () if self.sinks is None else (self.sinks[...],)
        return self.o(attention.attend(self.layer, q, k, v, *sinks), adapters)

    def _rotated(self, x: jax.Array, ropes: RopeTables) -> jax.Array:
        return x if self.rope is None else apply_rope(x, ropes[self.rope])
