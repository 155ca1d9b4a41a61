"""Paged attention in plain XLA: online softmax over blocks of pages, in one dynamic loop.

The loop runs over as many blocks as the longest row needs, so one executable serves every
context length. Online softmax: Milakov and Gimelshein, 2018 (arXiv:1805.02867).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK_TOKENS = 256
"""Key positions of one loop iteration."""

MASKED = -1e30
"""Score of an invisible key: finite, so that rows without any visible key give no NaN."""


def paged_attention(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    q_start: jax.Array,
    q_lens: jax.Array,
    *,
    sliding_window: int | None,
) -> jax.Array:
    """See `api.paged_attention`."""
    B, T, H, D = q.shape
    _, _, KH, S, _ = pages.shape
    G = H // KH
    block_pages = max(1, min(BLOCK_TOKENS // S, page_table.shape[1]))
    block = block_pages * S
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % block_pages)))

    # [B, KH, T * G, D]: all queries that share a KV head are the rows of one matrix.
    q = (q * D**-0.5).astype(q.dtype).reshape(B, T, KH, G, D)
    q = q.transpose(0, 2, 1, 3, 4).reshape(B, KH, T * G, D)
    position = q_start[:, None] + jnp.arange(T, dtype=jnp.int32)
    position = jnp.repeat(position, G, axis=1)[:, None, :, None]
    end = jnp.where(q_lens > 0, q_start + q_lens, 0)
    first = jnp.zeros_like(q_start)
    if sliding_window is not None:
        first = jnp.maximum(q_start - (sliding_window - 1), 0)
    first_block = jnp.min(jnp.where(q_lens > 0, first, jnp.iinfo(jnp.int32).max)) // block
    last_block = (jnp.max(end) + block - 1) // block

    def step(i, carry):
        highest, total, out = carry
        ids = jax.lax.dynamic_slice_in_dim(page_table, i * block_pages, block_pages, 1)
        kv = pages[ids].transpose(2, 0, 3, 1, 4, 5).reshape(2, B, KH, block, D)
        key = i * block + jnp.arange(block, dtype=jnp.int32)
        used = (key >= first[:, None]) & (key < end[:, None])
        # Unused slots may hold NaN, and 0 * NaN is NaN.
        v = jnp.where(used[:, None, :, None], kv[1], 0)
        scores = jnp.einsum("bhqd,bhjd->bhqj", q, kv[0], preferred_element_type=jnp.float32)
        visible = used[:, None, None, :] & (key <= position)
        if sliding_window is not None:
            visible &= key > position - sliding_window
        scores = jnp.where(visible, scores, MASKED)
        new_highest = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
        rescale = jnp.exp(highest - new_highest)
        weights = jnp.exp(scores - new_highest)
        total = total * rescale + weights.sum(axis=-1, keepdims=True)
        update = jnp.einsum(
            "bhqj,bhjd->bhqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return new_highest, total, out * rescale + update

    highest = jnp.full((B, KH, T * G, 1), MASKED, jnp.float32)
    total = jnp.zeros((B, KH, T * G, 1), jnp.float32)
    out = jnp.zeros((B, KH, T * G, D), jnp.float32)
    _, total, out = jax.lax.fori_loop(first_block, last_block, step, (highest, total, out))
    out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    out = out.reshape(B, KH, T, G, D).transpose(0, 2, 1, 3, 4)
    return out.reshape(B, T, H, D).astype(q.dtype)
