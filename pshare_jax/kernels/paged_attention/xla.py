"""Paged attention in plain XLA: one loop over tiles of queries, one over blocks of pages.

A tile is up to `TILE_QUERIES` queries of one row, and visits only the pages that they see: trip
counts are run-time values, so one executable serves every context length and skips what lies
before a sliding window. The softmax is accumulated block by block (Milakov and Gimelshein, 2018,
arXiv 1805.02867). Written for CPUs: single pages are sliced, since a slice of contiguous memory
is copied at twice the speed of XLA's gather, and temporaries are of a tile's size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from pshare_jax.kernels.partial_softmax import MASKED

TILE_QUERIES = 256
"""Most queries of one tile."""

BLOCK_PAGES = 8
"""Most pages of one block. Each is a slice of its own, and slices cost compile time."""

DECODE_BLOCK_TOKENS = 512
"""Most key positions of one block for one query a row: large copies use all cores."""

PREFILL_BLOCK_TOKENS = 256
"""Most key positions of one block for many queries a row: a tile's scores stay in the cache."""


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
    """See `api.paged_attention`."""
    del mesh  # XLA splits the work as its operands lie.
    B, T, H, D = q.shape
    _, _, KH, S, _ = pages.shape
    G = H // KH
    tiles = -(-T // TILE_QUERIES)
    tile = -(-T // tiles)
    M = tile * G
    block_tokens = DECODE_BLOCK_TOKENS if T == 1 else PREFILL_BLOCK_TOKENS
    block_pages = max(1, min(BLOCK_PAGES, block_tokens // S, page_table.shape[1]))
    block = block_pages * S
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % block_pages)))

    # [B * tiles, KH, M, D]: the queries that share a KV head are the rows of one matrix.
    q = jnp.pad(q, ((0, 0), (0, tiles * tile - T), (0, 0), (0, 0)))
    q = q.reshape(B, tiles, tile, KH, G, D).transpose(0, 1, 3, 2, 4, 5)
    q = q.reshape(B * tiles, KH, M, D)
    # A sink is a score that has been seen before all others, with nothing to give.
    highest, seen_before = jnp.full((KH, M, 1), MASKED, jnp.float32), 0.0
    if sinks is not None:
        of_heads = sinks.astype(jnp.float32).reshape(KH, 1, G)
        highest = jnp.broadcast_to(of_heads, (KH, tile, G)).reshape(KH, M, 1)
        seen_before = 1.0
    offset = jnp.repeat(jnp.arange(tile, dtype=jnp.int32), G)[:, None]

    def attend_tile(index: jax.Array, out: jax.Array) -> jax.Array:
        row = index // tiles
        start = q_start[row] + index % tiles * tile
        end = jnp.minimum(start + tile, q_start[row] + q_lens[row])
        first = jnp.int32(0)
        if sliding_window is not None:
            first = jnp.maximum(start - (sliding_window - 1), 0)
        last_block = jnp.where(start < end, (end + block - 1) // block, 0)
        # Padding queries look where the last valid one does.
        position = jnp.minimum(start + offset, end - 1)
        queries = lax.dynamic_index_in_dim(q, index, keepdims=False).astype(jnp.float32) * D**-0.5

        def load(ids: jax.Array, part: int) -> jax.Array:
            slices = [lax.dynamic_slice(pages, (i, part, 0, 0, 0), (1, 1, KH, S, D)) for i in ids]
            block = lax.concatenate([page.reshape(KH, S, D) for page in slices], 1)
            return block.astype(jnp.float32)

        def attend_block(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            highest, total, acc = carry
            ids = lax.dynamic_slice(page_table, (row, i * block_pages), (1, block_pages))[0]
            key = i * block + jnp.arange(block, dtype=jnp.int32)
            stored = (key >= first) & (key < end)
            seen = key <= position
            if sliding_window is not None:
                seen &= key > position - sliding_window
            k = load(ids, 0)
            # Other slots may hold NaN, and 0 * NaN is NaN.
            v = jnp.where(stored[:, None], load(ids, 1), 0)
            scores = jnp.einsum("kmd,kjd->kmj", queries, k)
            if soft_cap is not None:
                scores = soft_cap * jnp.tanh(scores / soft_cap)
            scores = jnp.where(seen, scores, MASKED)
            new_highest = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
            rescale = jnp.exp(highest - new_highest)
            weights = jnp.exp(scores - new_highest)
            total = total * rescale + weights.sum(axis=-1, keepdims=True)
            update = jnp.einsum("kmj,kjd->kmd", weights, v)
            return new_highest, total, acc * rescale + update

        init = (
            highest,
            jnp.full((KH, M, 1), seen_before, jnp.float32),
            jnp.zeros((KH, M, D), jnp.float32),
        )
        _, total, acc = lax.fori_loop(first // block, last_block, attend_block, init)
        # A tile without valid queries has visited nothing: 0 / tiny.
        result = acc / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return lax.dynamic_update_index_in_dim(out, result.astype(out.dtype), index, 0)

    out = lax.fori_loop(0, B * tiles, attend_tile, jnp.zeros_like(q))
    out = out.reshape(B, tiles, KH, tile, G, D).transpose(0, 1, 3, 2, 4, 5)
    return out.reshape(B, tiles * tile, H, D)[:, :T]
