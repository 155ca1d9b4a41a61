"""Long examples in less memory: attention in blocks of queries.

Each block is computed again for the gradient, so that scores are not kept. The results are those of
the whole, within rounding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pshare_jax.kernels.backends import CPU_FFI
from pshare_jax.kernels.masked_attention.cpu_ffi import masked_attention
from pshare_jax.models.attention import CausalAttention, causal_mask, dense_attention
from pshare_jax.models.config import ModelConfig

BLOCK = 256
"""Queries of a block; fewer are one call, whose scores are kept."""


def blocked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    soft_cap: float | None,
    sinks: jax.Array | None = None,
    *,
    constant_keys: int = 0,
    backend: str = "xla",
) -> jax.Array:
    """See `models.attention.dense_attention`; `mask` is `[B, T, S]` or `[T, S]`.

    Args:
        q: as there; so are k, v, soft_cap and sinks.
        k: see q.
        v: see q.
        mask: see above.
        soft_cap: see q.
        sinks: see q.
        constant_keys: of so many of the first keys and values no gradient is needed.
        backend: `cpu_ffi` for C++ where it can do it: without soft_cap and sinks.
    """
    B, T = q.shape[:2]
    if backend == CPU_FFI and soft_cap is None and sinks is None:
        mask = jnp.broadcast_to(mask, (B, *mask.shape[-2:]))
        return masked_attention(q, k, v, mask, constant_keys)
    if T <= BLOCK:
        return dense_attention(q, k, v, mask, soft_cap, sinks)
    padding = -T % BLOCK
    mask = jnp.broadcast_to(mask, (B, *mask.shape[-2:]))
    # A padded query sees all keys: one that sees none would divide by zero.
    mask = jnp.pad(mask, ((0, 0), (0, padding), (0, 0)), constant_values=True)
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))

    @jax.checkpoint
    def attend(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        queries, visible = block
        return dense_attention(queries, k, v, visible, soft_cap, sinks)

    out = jax.lax.map(attend, (_blocks(q, BLOCK), _blocks(mask, BLOCK)))
    return jnp.moveaxis(out, 0, 1).reshape(B, T + padding, *out.shape[3:])[:, :T]


class BlockedCausalAttention(CausalAttention):
    """`CausalAttention` in blocks of queries; `backend` as for `blocked_attention`."""

    def __init__(self, config: ModelConfig, backend: str = "xla"):
        super().__init__(config)
        self._backend = backend

    def attend(
        self,
        layer: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        sinks: jax.Array | None = None,
    ) -> jax.Array:
        """See `AttentionIO.attend`."""
        steps = jnp.arange(q.shape[1])
        mask = self._masks.of(layer, lambda window: causal_mask(steps, steps, window))
        soft_cap = self._config.attention_soft_cap
        return blocked_attention(q, k, v, mask, soft_cap, sinks, backend=self._backend)


def _blocks(array: jax.Array, size: int) -> jax.Array:
    """`[B, n * size, ...]` -> `[n, B, size, ...]`."""
    B, length = array.shape[:2]
    return jnp.moveaxis(array.reshape(B, length // size, size, *array.shape[2:]), 1, 0)
