"""Shared-prefix attention in plain XLA: a pass over runs, a pass over rows' tails, a merge.

Both passes are the same loop over blocks of pages with a run-time trip count; in the first the
queries of all members are the rows of one matrix. The partial softmaxes are merged by log-sum-exp.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from pshare_jax.kernels.paged_attention.xla import BLOCK_PAGES, DECODE_BLOCK_TOKENS
from pshare_jax.kernels.partial_softmax import (
    MASKED,
    PartialSoftmax,
    merge,
    nothing,
    with_sinks,
)


def shared_prefix_attention(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    q_start: jax.Array,
    q_lens: jax.Array,
    members: jax.Array,
    run_lens: jax.Array,
    *,
    sliding_window: int | None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """See `api.shared_prefix_attention`."""
    del mesh  # XLA splits the work as its operands lie.
    B, _, H, D = q.shape
    _, _, KH, S, _ = pages.shape
    G, (E, R) = H // KH, members.shape
    block_pages = max(1, min(BLOCK_PAGES, DECODE_BLOCK_TOKENS // S, page_table.shape[1]))
    # Blocks begin at any page, and a slice that passed the end would be moved back.
    table = jnp.pad(page_table, ((0, 0), (0, block_pages)))
    queries = q.reshape(B, KH, G, D).astype(jnp.float32) * D**-0.5

    def first_seen(position: jax.Array) -> jax.Array:
        if sliding_window is None:
            return jnp.zeros_like(position)
        return jnp.maximum(position - (sliding_window - 1), 0)

    def attend(
        rows: jax.Array, position: jax.Array, leader: jax.Array, first: jax.Array, end: jax.Array
    ) -> PartialSoftmax:
        """Queries of `rows` at `position` over keys first .. end - 1 of the leader's pages."""
        count = rows.shape[0]
        matrix = queries[rows].transpose(1, 0, 2, 3).reshape(KH, count * G, D)
        position = jnp.repeat(position, G)[:, None]
        block, first_page = block_pages * S, first // S

        def load(ids: jax.Array, part: int) -> jax.Array:
            slices = [lax.dynamic_slice(pages, (i, part, 0, 0, 0), (1, 1, KH, S, D)) for i in ids]
            keys = lax.concatenate([page.reshape(KH, S, D) for page in slices], 1)
            return keys.astype(jnp.float32)

        def attend_block(i: jax.Array, so_far: PartialSoftmax) -> PartialSoftmax:
            page = first_page + i * block_pages
            ids = lax.dynamic_slice(table, (leader, page), (1, block_pages))[0]
            key = page * S + jnp.arange(block, dtype=jnp.int32)
            stored = (key >= first) & (key < end)
            seen = stored & (key <= position) & (key >= first_seen(position))
            # Other slots may hold NaN, and 0 * NaN is NaN.
            v = jnp.where(stored[:, None], load(ids, 1), 0)
            scores = jnp.einsum("kmd,kjd->kmj", matrix, load(ids, 0))
            if soft_cap is not None:
                scores = soft_cap * jnp.tanh(scores / soft_cap)
            scores = jnp.where(seen, scores, MASKED)
            highest = scores.max(axis=-1)
            # A query that sees none of the block has weights 0, not exp(MASKED - MASKED).
            weights = jnp.where(seen, jnp.exp(scores - highest[..., None]), 0)
            values = jnp.einsum("kmj,kjd->kmd", weights, v)
            return merge(so_far, PartialSoftmax(highest, weights.sum(axis=-1), values))

        blocks = jnp.where(first < end, (end - first_page * S + block - 1) // block, 0)
        state = lax.fori_loop(0, blocks, attend_block, nothing((KH, count * G), D))
        parts = (x.reshape(KH, count, G, *x.shape[2:]) for x in state)
        return PartialSoftmax(*(jnp.moveaxis(x, 1, 0) for x in parts))

    def attend_run(group: jax.Array, states: PartialSoftmax) -> PartialSoftmax:
        rows = members[group]
        place = jnp.minimum(rows, B - 1)
        valid = (rows < B) & (q_lens[place] > 0)
        # The member of the lowest position sees all of the run that any member sees.
        lowest = jnp.argmin(jnp.where(valid, q_start[place], jnp.iinfo(jnp.int32).max))
        end = jnp.where(valid.any(), run_lens[group], 0)
        first = first_seen(q_start[place[lowest]])
        state = attend(place, q_start[place], place[lowest], first, end)
        # Places that are not valid go to row B, which does not exist, and are dropped.
        at = jnp.where(valid, rows, B)
        return PartialSoftmax(
            *(old.at[at].set(new, mode="drop") for old, new in zip(states, state, strict=True))
        )

    shared = lax.fori_loop(0, E, attend_run, nothing((B, KH, G), D))
    run_of_row = jnp.zeros(B, jnp.int32)
    lens = jnp.broadcast_to(run_lens[:, None], (E, R))
    run_of_row = run_of_row.at[members].max(lens, mode="drop")

    def attend_tail(row: jax.Array, out: jax.Array) -> jax.Array:
        start = q_start[row]
        first = jnp.maximum(first_seen(start), run_of_row[row])
        end = jnp.where(q_lens[row] > 0, start + 1, 0)
        tail = attend(row[None], start[None], row, first, end)
        run = PartialSoftmax(*(lax.dynamic_index_in_dim(x, row) for x in shared))
        whole = merge(run, tail)
        if sinks is not None:
            whole = with_sinks(whole, sinks.reshape(KH, G))
        result = whole.result(out.dtype)
        return lax.dynamic_update_slice(out, result, (row, 0, 0, 0))

    out = lax.fori_loop(0, B, attend_tail, jnp.zeros((B, KH, G, D), q.dtype))
    return out.reshape(B, 1, H, D)
