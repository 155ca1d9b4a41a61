"""Paged attention by its definition: lay the pages out as one sequence, mask, softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh


def paged_attention(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    q_start: jax.Array,
    q_lens: jax.Array,
    *,
    sliding_window: int | None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """See `api.paged_attention`; everything in float32."""
    del mesh  # XLA splits the work as its operands lie.
    B, T, H, D = q.shape
    kv_heads = pages.shape[2]

    # [B, N, 2, KH, S, D] -> [2, B, KH, N * S, D]: key position j of each row at index j.
    kv = pages[page_table].astype(jnp.float32).transpose(2, 0, 3, 1, 4, 5)
    k, v = kv.reshape(2, B, kv_heads, -1, D)
    k = jnp.repeat(k, H // kv_heads, axis=1)
    v = jnp.repeat(v, H // kv_heads, axis=1)

    query = q_start[:, None, None] + jnp.arange(T)[None, :, None]
    key = jnp.arange(k.shape[2])[None, None, :]
    visible = (key <= query) & (jnp.arange(T)[None, :, None] < q_lens[:, None, None])
    if sliding_window is not None:
        visible &= key > query - sliding_window

    # Slots that no query sees may hold anything, and 0 * NaN is NaN.
    v = jnp.where(visible.any(axis=1)[:, None, :, None], v, 0.0)
    scores = jnp.einsum("bthd,bhjd->bhtj", q.astype(jnp.float32), k, precision="highest")
    scores = scores * D**-0.5
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    # A query that sees nothing (padding) has weights 0 and output 0.
    highest = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min)
    own = 0.0
    if sinks is not None:
        sink = sinks.astype(jnp.float32)[None, :, None, None]
        highest = jnp.maximum(highest, sink)
        own = jnp.exp(sink - highest)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True) + own
    weights = weights / jnp.where(total == 0.0, 1.0, total)
    return jnp.einsum("bhtj,bhjd->bthd", weights, v, precision="highest").astype(q.dtype)
