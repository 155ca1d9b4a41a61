"""The body of the paged attention kernels for TPUs (Pallas, Mosaic).

Tiling: one program is up to `Tiles.queries` queries of one row, all its KV heads; it loops over
blocks of whole pages, about `Tiles.*_keys` positions each, with a run-time trip count.
VMEM: the program's queries and output (pipelined by the grid), two block buffers of
[pages, 2, KH, S, D], and float32 softmax state of [KH, M, D + 256] (M = queries x group).
SMEM: page table and key ranges (prefetched scalars), and the number of the current buffer.
Copies: each page is contiguous in HBM and copied as one; while a block is computed the next one is
under way, and the last block of a program starts the first one of the next program.
Intensity: M FLOPs a byte of bfloat16 pages: a v5 and a v6e turn from HBM to the MXU at M = 240 and
560, so one query of a group of 4 .. 8 is bound by HBM, and so is a run with fewer than 60 members.
Online softmax: Milakov and Gimelshein, arXiv 1805.02867.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pshare_jax.kernels.partial_softmax import MASKED

LANES = 128
"""Width of a vector register; row statistics are kept in all of its lanes."""


class Static(NamedTuple):
    """What is fixed when the kernel is compiled.

    With `sinks`, the softmax begins with a score that the rows are given, and that gives nothing.

    `causal`: query i of a program is at position `query + i` of its scalars, sees keys up to its
    own and with a `window` only the last ones, and the output is normalised. Otherwise every query
    sees the whole range, or with `bounded` what lies past its own first key, and the outputs are
    the parts of a `PartialSoftmax`.
    """

    tile: int
    tiles_per_row: int
    block_pages: int
    page_size: int
    pages_per_row: int
    kv_heads: int
    all_kv_heads: int
    causal: bool
    bounded: bool
    window: int | None
    soft_cap: float | None
    sinks: bool


class Scalars(NamedTuple):
    """Prefetched int32: `table [rows * pages_per_row]`, `head [1]`, and for each program its keys
    `first .. end - 1` and the position of its first query."""

    table: Any
    first: Any
    end: Any
    query: Any
    head: Any


class _Span(NamedTuple):
    """What one program attends to: keys first .. end - 1, in blocks first_block .. end_block - 1.

    `query` is the position of its first query.
    """

    row: jax.Array
    query: jax.Array
    first: jax.Array
    end: jax.Array
    first_block: jax.Array
    end_block: jax.Array


def _span(static: Static, program: jax.Array, scalars: Scalars) -> _Span:
    first, end = scalars.first[program], scalars.end[program]
    block = static.block_pages * static.page_size
    first_block = lax.div(first, block)
    # An empty program visits one block without pages, so that the buffers keep alternating.
    end_block = jnp.maximum(lax.div(end + block - 1, block), first_block + 1)
    row = lax.div(program, static.tiles_per_row)
    return _Span(row, scalars.query[program], first, end, first_block, end_block)


def kernel(static: Static, *refs: Any) -> None:
    """Attention of one program; see `pallas_tpu` for the blocks that `refs` are."""
    scalars, (q_ref, *inputs) = Scalars(*refs[:5]), refs[5:]
    from_ref = inputs.pop(0) if static.bounded else None
    sinks_ref = inputs.pop(0) if static.sinks else None
    pages_ref, *outputs, buffers, arrivals, buffer_ref, highest_ref, total_ref, acc_ref = inputs
    index, per_core = pl.program_id(1), pl.num_programs(1)
    program = pl.program_id(0) * per_core + index
    span = _span(static, program, scalars)
    page_size, block_pages = static.page_size, static.block_pages
    block = block_pages * page_size

    def for_each_copy(span: _Span, block_index: jax.Array, buffer: jax.Array, action: str) -> None:
        first_page = lax.div(span.first, page_size)
        end_page = lax.div(span.end + page_size - 1, page_size)
        for j in range(block_pages):
            number = block_index * block_pages + j

            @pl.when((number >= first_page) & (number < end_page))
            def _(j: int = j, number: jax.Array = number) -> None:
                page = pages_ref.at[scalars.table[span.row * static.pages_per_row + number]]
                if static.kv_heads != static.all_kv_heads:
                    page = page.at[:, pl.ds(scalars.head[0], static.kv_heads)]
                copy = pltpu.make_async_copy(page, buffers.at[buffer, j], arrivals.at[buffer])
                getattr(copy, action)()

    @pl.when(index == 0)
    def _() -> None:
        buffer_ref[0] = 0
        for_each_copy(span, span.first_block, jnp.int32(0), "start")

    if sinks_ref is None:
        highest_ref[...] = jnp.full_like(highest_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)
    else:
        highest_ref[...] = sinks_ref[...]
        total_ref[...] = jnp.ones_like(total_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

    def attend_block(block_index: jax.Array, buffer: jax.Array) -> jax.Array:
        is_last = block_index + 1 == span.end_block

        @pl.when(jnp.logical_not(is_last))
        def _() -> None:
            for_each_copy(span, block_index + 1, 1 - buffer, "start")

        @pl.when(is_last & (index + 1 < per_core))
        def _() -> None:
            following = _span(static, program + 1, scalars)
            for_each_copy(following, following.first_block, 1 - buffer, "start")

        for_each_copy(span, block_index, buffer, "wait")
        first_key = block_index * block
        is_partial = (first_key < span.first) | (first_key + block > span.end)

        @pl.when(is_partial)
        def _() -> None:
            _clear_unseen_values(static, span, first_key, buffers.at[buffer])

        def attend_head(head: jax.Array | int, carry: None) -> None:
            del carry
            _attend_head(
                static,
                span,
                first_key,
                q_ref.at[head],
                from_ref,
                buffers.at[buffer, :, 0, head],
                buffers.at[buffer, :, 1, head],
                highest_ref.at[head],
                total_ref.at[head],
                acc_ref.at[head],
            )

        @pl.when(span.first < span.end)
        def _() -> None:
            # Unrolled, heads overlap in the pipeline; many queries fill it by themselves.
            lax.fori_loop(0, static.kv_heads, attend_head, None, unroll=static.tile == 1)

        return 1 - buffer

    buffer_ref[0] = lax.fori_loop(span.first_block, span.end_block, attend_block, buffer_ref[0])
    if static.causal:
        # An empty program has total 0 and gives 0.
        total = jnp.maximum(total_ref[:, :, :1], jnp.finfo(jnp.float32).tiny)
        outputs[0][...] = (acc_ref[...] / total).astype(outputs[0].dtype)
    else:
        outputs[0][...] = acc_ref[...]
        _store_heads_in_lanes(highest_ref, outputs[1])
        _store_heads_in_lanes(total_ref, outputs[2])


def _store_heads_in_lanes(statistic_ref: Any, out_ref: Any) -> None:
    """`[KH, M, LANES]`, equal in all lanes -> `[KH / LANES, M, LANES]` with a head in each lane."""
    kv_heads, M, _ = statistic_ref.shape
    lane = lax.broadcasted_iota(jnp.int32, (M, LANES), 1)
    for part in range(out_ref.shape[0]):
        out = jnp.zeros((M, LANES), jnp.float32)
        for i in range(min(LANES, kv_heads - part * LANES)):
            out = jnp.where(lane == i, statistic_ref[part * LANES + i], out)
        out_ref[part] = out


def _clear_unseen_values(static: Static, span: _Span, first_key: jax.Array, buffer: Any) -> None:
    """Zeroes V outside of first .. end: those slots may hold NaN, and 0 * NaN is NaN."""
    shape = buffer.shape[2:]
    for j in range(static.block_pages):
        key = first_key + j * static.page_size + lax.broadcasted_iota(jnp.int32, shape, 1)
        seen = (key >= span.first) & (key < span.end)
        values = buffer[j, 1]
        buffer[j, 1] = jnp.where(seen, values, jnp.zeros_like(values))


def _seen(
    static: Static, span: _Span, first_key: jax.Array, from_ref: Any, shape: tuple[int, int]
) -> jax.Array:
    """Which keys of a block which queries see, bool of `shape` [M, block]."""
    key = first_key + lax.broadcasted_iota(jnp.int32, shape, 1)
    seen = key < span.end
    if static.causal:
        # Rows are group-major: row r of a tile is its query r % tile.
        query = span.query + (lax.broadcasted_iota(jnp.int32, shape, 0) & (static.tile - 1))
        seen &= key <= query
        if static.window is not None:
            seen &= key > query - static.window
        return seen
    seen &= key >= span.first
    if static.bounded:
        seen &= key >= from_ref[:, :1]
    return seen


def _attend_head(
    static: Static,
    span: _Span,
    first_key: jax.Array,
    q_ref: Any,
    from_ref: Any,
    k_ref: Any,
    v_ref: Any,
    highest_ref: Any,
    total_ref: Any,
    acc_ref: Any,
) -> None:
    M, D = q_ref.shape
    block = static.block_pages * static.page_size
    k, v = k_ref[...].reshape(block, D), v_ref[...].reshape(block, D)
    scores = _dot(q_ref[...], k, contract=(1, 1)) * D**-0.5
    if static.soft_cap is not None:
        scores = static.soft_cap * jnp.tanh(scores / static.soft_cap)
    scores = jnp.where(_seen(static, span, first_key, from_ref, (M, block)), scores, MASKED)

    highest = highest_ref[:, :1]
    new_highest = jnp.maximum(highest, scores.max(axis=1, keepdims=True))
    rescale = jnp.exp(highest - new_highest)
    weights = jnp.exp(scores - new_highest)
    total = total_ref[:, :1] * rescale + weights.sum(axis=1, keepdims=True)
    acc_ref[...] = acc_ref[...] * rescale + _dot(weights.astype(v.dtype), v, contract=(1, 0))
    highest_ref[...] = jnp.broadcast_to(new_highest, highest_ref.shape)
    total_ref[...] = jnp.broadcast_to(total, total_ref.shape)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A product in float32: the MXU rounds float32 operands to bfloat16 unless told not to."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )
