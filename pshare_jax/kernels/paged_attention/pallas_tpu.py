"""Paged attention for TPUs (Pallas, Mosaic).

Tiling: one program is up to `Tiles.queries` queries of one row, all its KV heads; it loops over
blocks of whole pages, about `Tiles.keys` positions each, with a run-time trip count.
VMEM: the program's queries and output (pipelined by the grid), two block buffers of
[pages, 2, KH, S, D], and float32 softmax state of [KH, M, D + 256] (M = queries x group).
SMEM: page table, starts and lengths (prefetched scalars), and the number of the current buffer.
Copies: each page is contiguous in HBM and copied as one; while a block is computed the next one is
under way, and the last block of a program starts the first one of the next program.
Intensity: M FLOPs a byte of bfloat16 pages: decode (M = 4 .. 8) is bound by HBM; tiles of 64 and
128 queries (M = 256, 512 in groups of 4) are where a v5 and a v6e turn from HBM to the MXU.
Online softmax: Milakov and Gimelshein, arXiv 1805.02867.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

MASKED = -1e30
"""Score of a key that is not seen: finite, so that a query that sees nothing makes no NaN."""

LANES = 128
"""Width of a vector register; row statistics are kept in all of its lanes."""


@dataclass(frozen=True)
class Tiles:
    """Sizes that depend on the chip.

    Args:
        queries: most queries of one program, a power of two.
        decode_keys: KV positions of one block for one query a row.
        prefill_keys: KV positions of one block for many queries a row.
        cores: TensorCores that share the programs of one device.
        vmem_limit_bytes: VMEM that the kernel may use.
    """

    queries: int = 64
    decode_keys: int = 512
    prefill_keys: int = 512
    cores: int = 1
    vmem_limit_bytes: int = 48 * 2**20


TILES = {
    "TPU v5 lite": Tiles(),
    "TPU v5": Tiles(cores=2),
    "TPU v6 lite": Tiles(queries=128),
}
"""By JAX's device kind; other kinds take the defaults."""


class _Static(NamedTuple):
    tile: int
    tiles_per_row: int
    block_pages: int
    page_size: int
    pages_per_row: int
    kv_heads: int
    all_kv_heads: int
    window: int | None
    soft_cap: float | None


class _Span(NamedTuple):
    """What one program attends to: keys first .. end - 1, in blocks first_block .. end_block - 1.

    `query` is the position of its first query; the last valid one is at end - 1.
    """

    row: jax.Array
    query: jax.Array
    first: jax.Array
    end: jax.Array
    first_block: jax.Array
    end_block: jax.Array


@functools.partial(
    # One trace and one lowering for all layers of a step.
    jax.jit,
    static_argnames=("sliding_window", "soft_cap", "kv_heads", "tiles", "interpret"),
)
def paged_attention(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    q_start: jax.Array,
    q_lens: jax.Array,
    *,
    sliding_window: int | None,
    soft_cap: float | None = None,
    first_kv_head: jax.Array | None = None,
    kv_heads: int | None = None,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> jax.Array:
    """See `api.paged_attention`.

    Args:
        q: `[B, T, heads, head_dim]`.
        pages: `[num_pages, 2, all KV heads, page_size, head_dim]`.
        page_table: `[B, N]` int32.
        q_start: `[B]` int32.
        q_lens: `[B]` int32.
        sliding_window: see api.
        soft_cap: see api.
        first_kv_head: int32 scalar, the KV head that query head 0 reads; 0 if None.
        kv_heads: number of KV heads that q's heads read, all of them if None.
        tiles: sizes for the chip.
        interpret: run the kernel in Pallas' interpreter (True or `pltpu.InterpretParams`).
    """
    B, T, H, D = q.shape
    _, _, all_kv_heads, S, _ = pages.shape
    KH = all_kv_heads if kv_heads is None else kv_heads
    G = H // KH
    N = page_table.shape[1]
    tiles = tiles or Tiles()
    tile = min(tiles.queries, pl.next_power_of_2(T))
    tiles_per_row = pl.cdiv(T, tile)
    programs = B * tiles_per_row
    keys = tiles.decode_keys if T == 1 else tiles.prefill_keys
    block_pages = max(1, min(keys // S, N))
    cores = tiles.cores if programs % tiles.cores == 0 else 1

    # [programs, KH, M, D], rows group-major: row r of a tile is its query r % tile.
    q = jnp.pad(q, ((0, 0), (0, tiles_per_row * tile - T), (0, 0), (0, 0)))
    q = q.reshape(B, tiles_per_row, tile, KH, G, D).transpose(0, 1, 3, 4, 2, 5)
    q = q.reshape(programs, KH, G * tile, D)
    sublanes = 32 // q.dtype.itemsize
    M = pl.cdiv(G * tile, sublanes) * sublanes
    q = jnp.pad(q, ((0, 0), (0, 0), (0, M - G * tile), (0, 0)))

    static = _Static(
        tile, tiles_per_row, block_pages, S, N, KH, all_kv_heads, sliding_window, soft_cap
    )
    per_core = programs // cores
    head = jnp.zeros((), jnp.int32) if first_kv_head is None else first_kv_head
    q_block = pl.BlockSpec((None, KH, M, D), lambda c, i, *_: (c * per_core + i, 0, 0, 0))
    out = pl.pallas_call(
        functools.partial(_kernel, static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(cores, per_core),
            in_specs=[q_block, pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=q_block,
            scratch_shapes=[
                pltpu.VMEM((2, block_pages, 2, KH, S, D), pages.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM((KH, M, LANES), jnp.float32),
                pltpu.VMEM((KH, M, LANES), jnp.float32),
                pltpu.VMEM((KH, M, D), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=tiles.vmem_limit_bytes,
        ),
        cost_estimate=_cost_of_full_pages(q, pages, N * S),
        interpret=interpret,
        name="paged_attention",
    )(page_table.reshape(-1), q_start, q_lens, head.reshape(1), q, pages)
    out = out[:, :, : G * tile].reshape(B, tiles_per_row, KH, G, tile, D)
    return out.transpose(0, 1, 4, 2, 3, 5).reshape(B, tiles_per_row * tile, H, D)[:, :T]


def _cost_of_full_pages(q: jax.Array, pages: jax.Array, keys: int) -> pl.CostEstimate:
    """For XLA's scheduler: as if every row filled its page table of `keys` positions."""
    programs, kv_heads, M, D = q.shape
    products = programs * kv_heads * M * keys
    kv = 2 * programs * kv_heads * keys * D * pages.dtype.itemsize
    return pl.CostEstimate(
        flops=4 * products * D,
        transcendentals=products,
        bytes_accessed=kv + 2 * q.size * q.dtype.itemsize,
    )


def _span(static: _Static, program: jax.Array, start_ref: Any, lens_ref: Any) -> _Span:
    row = lax.div(program, static.tiles_per_row)
    query = start_ref[row] + lax.rem(program, static.tiles_per_row) * static.tile
    end = jnp.minimum(query + static.tile, start_ref[row] + lens_ref[row])
    end = jnp.where(query < end, end, 0)
    first = jnp.int32(0)
    if static.window is not None:
        first = jnp.minimum(jnp.maximum(query - (static.window - 1), 0), end)
    block = static.block_pages * static.page_size
    first_block = lax.div(first, block)
    # An empty program visits one block without pages, so that the buffers keep alternating.
    end_block = jnp.maximum(lax.div(end + block - 1, block), first_block + 1)
    return _Span(row, query, first, end, first_block, end_block)


def _kernel(
    static: _Static,
    table_ref: Any,
    start_ref: Any,
    lens_ref: Any,
    head_ref: Any,
    q_ref: Any,
    pages_ref: Any,
    out_ref: Any,
    buffers: Any,
    arrivals: Any,
    buffer_ref: Any,
    highest_ref: Any,
    total_ref: Any,
    acc_ref: Any,
) -> None:
    index, per_core = pl.program_id(1), pl.num_programs(1)
    program = pl.program_id(0) * per_core + index
    span = _span(static, program, start_ref, lens_ref)
    page_size, block_pages = static.page_size, static.block_pages
    block = block_pages * page_size

    def for_each_copy(span: _Span, block_index: jax.Array, buffer: jax.Array, action: str) -> None:
        first_page = lax.div(span.first, page_size)
        end_page = lax.div(span.end + page_size - 1, page_size)
        for j in range(block_pages):
            number = block_index * block_pages + j

            @pl.when((number >= first_page) & (number < end_page))
            def _(j: int = j, number: jax.Array = number) -> None:
                page = pages_ref.at[table_ref[span.row * static.pages_per_row + number]]
                if static.kv_heads != static.all_kv_heads:
                    page = page.at[:, pl.ds(head_ref[0], static.kv_heads)]
                copy = pltpu.make_async_copy(page, buffers.at[buffer, j], arrivals.at[buffer])
                getattr(copy, action)()

    @pl.when(index == 0)
    def _() -> None:
        buffer_ref[0] = 0
        for_each_copy(span, span.first_block, jnp.int32(0), "start")

    highest_ref[...] = jnp.full_like(highest_ref, MASKED)
    total_ref[...] = jnp.zeros_like(total_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

    def attend_block(block_index: jax.Array, buffer: jax.Array) -> jax.Array:
        is_last = block_index + 1 == span.end_block

        @pl.when(jnp.logical_not(is_last))
        def _() -> None:
            for_each_copy(span, block_index + 1, 1 - buffer, "start")

        @pl.when(is_last & (index + 1 < per_core))
        def _() -> None:
            following = _span(static, program + 1, start_ref, lens_ref)
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
                buffers.at[buffer, :, 0, head],
                buffers.at[buffer, :, 1, head],
                highest_ref.at[head],
                total_ref.at[head],
                acc_ref.at[head],
            )

        # Unrolled, heads overlap in the pipeline; many queries fill it by themselves.
        lax.fori_loop(0, static.kv_heads, attend_head, None, unroll=static.tile == 1)
        return 1 - buffer

    buffer_ref[0] = lax.fori_loop(span.first_block, span.end_block, attend_block, buffer_ref[0])
    # An empty program has total 0 and gives 0.
    total = jnp.maximum(total_ref[:, :, :1], jnp.finfo(jnp.float32).tiny)
    out_ref[...] = (acc_ref[...] / total).astype(out_ref.dtype)


def _clear_unseen_values(static: _Static, span: _Span, first_key: jax.Array, buffer: Any) -> None:
    """Zeroes V outside of first .. end: those slots may hold NaN, and 0 * NaN is NaN."""
    shape = buffer.shape[2:]
    for j in range(static.block_pages):
        key = first_key + j * static.page_size + lax.broadcasted_iota(jnp.int32, shape, 1)
        seen = (key >= span.first) & (key < span.end)
        values = buffer[j, 1]
        buffer[j, 1] = jnp.where(seen, values, jnp.zeros_like(values))


def _attend_head(
    static: _Static,
    span: _Span,
    first_key: jax.Array,
    q_ref: Any,
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
    shape = (M, block)
    key = first_key + lax.broadcasted_iota(jnp.int32, shape, 1)
    query = span.query + (lax.broadcasted_iota(jnp.int32, shape, 0) & (static.tile - 1))
    seen = (key <= query) & (key < span.end)
    if static.window is not None:
        seen &= key > query - static.window
    scores = jnp.where(seen, scores, MASKED)

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
