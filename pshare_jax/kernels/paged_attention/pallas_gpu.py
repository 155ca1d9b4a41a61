"""Paged attention for NVIDIA GPUs (Pallas, Triton).

Tiling: one program is `Tiles.rows` rows (query, head of the group) of one KV head of one sequence;
it loops over blocks of `Tiles.keys` positions with a run-time trip count. A block may span pages:
every position's page is looked up, and K and V are gathered row by row of head_dim.
Registers: queries, float32 output and softmax state. Shared memory: K and V blocks, `num_stages`
deep (Triton's pipeline). Head dims are padded to a power of two by masks, groups to 16 rows.
Split-K: where batch x KV heads x tiles leave multiprocessors idle, the positions of a row are
split over programs, and the partial results are merged by log-sum-exp (a small XLA program).
Intensity: one FLOP a row and byte of bfloat16 pages: decode (4 .. 8 rows) is bound by HBM, and so
are tiles of 64 rows but for K and V in L2, where the tiles of one chunk read the same.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pshare_jax.kernels.partial_softmax import (
    MASKED,
    PartialSoftmax,
    merge_first_axis,
    with_sinks,
)

MIN_DOT = 16
"""Smallest operand size of a Triton product."""

WIDE_ROW_BYTES = 512
"""Head rows above this size get half as many keys a block: shared memory is 227 KiB at best."""


@dataclass(frozen=True)
class Tiles:
    """Sizes that depend on the GPU.

    Args:
        rows: most rows of one program, a power of two from 16 up.
        keys: positions of one block, a power of two from 16 up.
        programs: number of programs that keeps all multiprocessors busy; decides the splits.
        split_keys: fewest positions, of those that the page table has, for a split of its own.
        num_warps: warps of one program.
        num_stages: blocks in flight.
    """

    rows: int = 64
    keys: int = 64
    programs: int = 256
    split_keys: int = 256
    num_warps: int = 4
    num_stages: int = 2


TILES = {
    "NVIDIA H100 80GB HBM3": Tiles(programs=264, num_stages=3),
}
"""By JAX's device kind; other kinds take the defaults."""


class _Static(NamedTuple):
    rows: int
    keys: int
    splits: int
    group: int
    soft_cap: float | None


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
    sinks: jax.Array | None = None,
    first_kv_head: jax.Array | None = None,
    kv_heads: int | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
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
        sinks: see api; of q's heads.
        first_kv_head: int32 scalar, the KV head that query head 0 reads; 0 if None.
        kv_heads: number of KV heads that q's heads read, all of them if None.
        tiles: sizes for the GPU.
        interpret: run the kernel in Pallas' interpreter.
    """
    token = jnp.arange(q.shape[1], dtype=jnp.int32)
    end = q_start[:, None] + token + 1
    end = jnp.where(token < q_lens[:, None], end, 0)
    first = jnp.zeros_like(end)
    if sliding_window is not None:
        first = jnp.maximum(end - sliding_window, 0)
    state = _attend(
        q, pages, page_table, first, end, soft_cap, first_kv_head, kv_heads, tiles, interpret
    )
    if sinks is not None:
        state = with_sinks(state, sinks)
    return state.result(q.dtype)


@functools.partial(jax.jit, static_argnames=("soft_cap", "kv_heads", "tiles", "interpret"))
def partial_attention(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    first: jax.Array,
    end: jax.Array,
    counts: jax.Array,
    seen_from: jax.Array | None = None,
    *,
    soft_cap: float | None = None,
    first_kv_head: jax.Array | None = None,
    kv_heads: int | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> PartialSoftmax:
    """See `pallas_tpu.partial_attention`."""
    is_valid = jnp.arange(q.shape[1], dtype=jnp.int32) < counts[:, None]
    of_query = jnp.where(is_valid, end[:, None], 0)
    from_query = jnp.broadcast_to(first[:, None], of_query.shape)
    if seen_from is not None:
        from_query = jnp.maximum(from_query, seen_from)
    return _attend(
        q,
        pages,
        page_table,
        from_query,
        of_query,
        soft_cap,
        first_kv_head,
        kv_heads,
        tiles,
        interpret,
    )


def _attend(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    first: jax.Array,
    end: jax.Array,
    soft_cap: float | None,
    first_kv_head: jax.Array | None,
    kv_heads: int | None,
    tiles: Tiles | None,
    interpret: bool,
) -> PartialSoftmax:
    """Each query sees its own keys first .. end - 1, `[B, T]` int32."""
    B, T, H, D = q.shape
    _, _, all_kv_heads, S, _ = pages.shape
    KH = all_kv_heads if kv_heads is None else kv_heads
    tiles = tiles or Tiles()
    rows = min(tiles.rows, max(MIN_DOT, pl.next_power_of_2(T * H // KH)))
    row_tiles = pl.cdiv(T * H // KH, rows)
    is_wide = pl.next_power_of_2(D) * pages.dtype.itemsize > WIDE_ROW_BYTES
    keys = max(MIN_DOT, tiles.keys // 2) if is_wide else tiles.keys
    idle = tiles.programs // (B * row_tiles * KH)
    useful = page_table.shape[1] * S // tiles.split_keys
    splits = max(1, min(idle, useful))

    head = jnp.zeros((), jnp.int32) if first_kv_head is None else first_kv_head
    partial = jax.ShapeDtypeStruct((splits, B, T, H, D), jnp.float32)
    statistic = jax.ShapeDtypeStruct((splits, B, T, H), jnp.float32)
    acc, highest, total = pl.pallas_call(
        functools.partial(_kernel, _Static(rows, keys, splits, H // KH, soft_cap)),
        grid=(B * row_tiles, KH, splits),
        out_shape=(partial, statistic, statistic),
        compiler_params=plgpu.CompilerParams(
            num_warps=tiles.num_warps, num_stages=tiles.num_stages
        ),
        interpret=interpret,
        name="paged_attention",
    )(page_table, first, end, head.reshape(1), q, pages)
    return merge_first_axis(PartialSoftmax(highest, total, acc))


def _kernel(
    static: _Static,
    table_ref: Any,
    first_ref: Any,
    end_ref: Any,
    head_ref: Any,
    q_ref: Any,
    pages_ref: Any,
    acc_ref: Any,
    highest_ref: Any,
    total_ref: Any,
) -> None:
    M, J, G = static.rows, static.keys, static.group
    B, T, _, D = q_ref.shape
    page_size = pages_ref.shape[3]
    row_tiles = pl.num_programs(0) // B
    b, tile = pl.program_id(0) // row_tiles, pl.program_id(0) % row_tiles
    kv_head, split = pl.program_id(1), pl.program_id(2)

    # Row r of the program is query r // G, head r % G of the group; queries come in order.
    r = tile * M + jnp.arange(M, dtype=jnp.int32)
    query, head = r // G, kv_head * G + r % G
    query_first = plgpu.load(first_ref.at[b, query], mask=query < T, other=0)
    query_end = plgpu.load(end_ref.at[b, query], mask=query < T, other=0)
    end = jnp.max(query_end)
    first = jnp.min(jnp.where(query_first < query_end, query_first, end))
    first_block = first // J
    blocks = jnp.maximum((end + J - 1) // J - first_block, 0)
    share = (blocks + static.splits - 1) // static.splits
    begin = jnp.minimum(split * share, blocks)
    stop = jnp.minimum(begin + share, blocks)

    width = pl.next_power_of_2(D)
    column = jnp.arange(width, dtype=jnp.int32)[None, :]
    in_head = column < D
    in_query = (query < T)[:, None]
    queries = plgpu.load(
        q_ref.at[b, query[:, None], head[:, None], column], mask=in_query & in_head, other=0.0
    )
    source_head = head_ref[0] + kv_head

    def attend_block(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        highest, total, acc = carry
        key = (first_block + i) * J + jnp.arange(J, dtype=jnp.int32)
        stored = (key >= first) & (key < end)
        page = plgpu.load(table_ref.at[b, key // page_size], mask=stored, other=0)
        slot = key % page_size
        # Other slots may hold NaN, and 0 * NaN is NaN: they are not loaded.
        mask = stored[:, None] & in_head
        k, v = (
            plgpu.load(
                pages_ref.at[page[:, None], part, source_head, slot[:, None], column],
                mask=mask,
                other=0.0,
            ).astype(queries.dtype)
            for part in (0, 1)
        )
        scores = _dot(queries, k, trans_b=True) * D**-0.5
        if static.soft_cap is not None:
            scores = static.soft_cap * jnp.tanh(scores / static.soft_cap)
        seen = (key[None, :] >= query_first[:, None]) & (key[None, :] < query_end[:, None])
        scores = jnp.where(seen, scores, MASKED)
        new_highest = jnp.maximum(highest, scores.max(axis=1))
        rescale = jnp.exp(highest - new_highest)
        weights = jnp.exp(scores - new_highest[:, None])
        total = total * rescale + weights.sum(axis=1)
        acc = acc * rescale[:, None] + _dot(weights.astype(v.dtype), v)
        return new_highest, total, acc

    init = (
        jnp.full((M,), MASKED, jnp.float32),
        jnp.zeros((M,), jnp.float32),
        jnp.zeros((M, width), jnp.float32),
    )
    highest, total, acc = lax.fori_loop(begin, stop, attend_block, init)
    plgpu.store(
        acc_ref.at[split, b, query[:, None], head[:, None], column], acc, mask=in_query & in_head
    )
    plgpu.store(highest_ref.at[split, b, query, head], highest, mask=query < T)
    plgpu.store(total_ref.at[split, b, query, head], total, mask=query < T)


def _dot(a: jax.Array, b: jax.Array, *, trans_b: bool = False) -> jax.Array:
    """A product in float32: tensor cores would round float32 operands to tf32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return plgpu.dot(a, b, trans_b=trans_b, precision=precision)
