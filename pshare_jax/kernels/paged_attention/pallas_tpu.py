"""Paged attention for TPUs: tile sizes, operands and results of the kernel in `tpu_kernel`.

Tiling: queries become [programs, KH, M, D], where a program is up to `Tiles.queries` queries of one
row and M those times the group, padded to whole vector registers. The grid is cores x programs.
VMEM and SMEM, copies and arithmetic intensity: see `tpu_kernel`.
`paged_attention` is the op. `partial_attention` attends to any range of a row's keys and returns
the unfinished softmax, float32, so that another call can see the other keys: per program it writes
4 D bytes a row of M, and 1 KiB of statistics, where the op writes 2 D.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pshare_jax.kernels.paged_attention.tpu_kernel import LANES, Scalars, Static, kernel
from pshare_jax.kernels.partial_softmax import PartialSoftmax


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
        sinks: see api; of q's heads.
        first_kv_head: int32 scalar, the KV head that query head 0 reads; 0 if None.
        kv_heads: number of KV heads that q's heads read, all of them if None.
        tiles: sizes for the chip.
        interpret: run the kernel in Pallas' interpreter (True or `pltpu.InterpretParams`).
    """
    call = _Call(q, pages, page_table, kv_heads, tiles or Tiles(), interpret)
    static = call.static(
        causal=True, window=sliding_window, soft_cap=soft_cap, sinks=sinks is not None
    )
    query = q_start[:, None] + jnp.arange(static.tiles_per_row, dtype=jnp.int32) * static.tile
    end = jnp.minimum(query + static.tile, (q_start + q_lens)[:, None])
    end = jnp.where(query < end, end, 0)
    first = jnp.zeros_like(end)
    if sliding_window is not None:
        first = jnp.minimum(jnp.maximum(query - (sliding_window - 1), 0), end)
    [out] = call.run(static, page_table, first, end, query, first_kv_head, None, sinks)
    return call.tokens(static, out)


@functools.partial(
    jax.jit,
    static_argnames=("soft_cap", "kv_heads", "tiles", "interpret"),
)
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
    interpret: Any = False,
) -> PartialSoftmax:
    """Attention of every query of a row to the row's keys first .. end - 1, not normalised.

    Args:
        q: `[B, T, heads, head_dim]`.
        pages: see `paged_attention`, as all arguments that are not named here.
        page_table: `[B, N]` int32.
        first: `[B]` int32.
        end: `[B]` int32.
        counts: `[B]` int32, number of queries of the row that count; others give finite garbage.
        seen_from: `[B, T]` int32, the first key that each query sees; None: all see `first`.
        soft_cap: see api.
        first_kv_head: see `paged_attention`.
        kv_heads: see `paged_attention`.
        tiles: see `paged_attention`.
        interpret: see `paged_attention`.

    Returns:
        Of queries `[B, T, heads]`.
    """
    call = _Call(q, pages, page_table, kv_heads, tiles or Tiles(), interpret)
    static = call.static(causal=False, bounded=seen_from is not None, soft_cap=soft_cap)
    before = jnp.arange(static.tiles_per_row, dtype=jnp.int32) * static.tile
    end = jnp.where(before < counts[:, None], end[:, None], 0)
    first = jnp.minimum(first[:, None], end)
    values, *statistics = call.run(
        static, page_table, first, end, jnp.zeros_like(end), first_kv_head, seen_from
    )
    highest, total = (call.heads_of_lanes(static, x) for x in statistics)
    return PartialSoftmax(highest, total, call.tokens(static, values))


class _Call(NamedTuple):
    """How the operands of one call are laid out for the kernel and its results laid back."""

    q: jax.Array
    pages: jax.Array
    page_table: jax.Array
    own_kv_heads: int | None
    tiles: Tiles
    interpret: Any

    def static(self, **mode: Any) -> Static:
        T, N = self.q.shape[1], self.page_table.shape[1]
        _, _, all_kv_heads, S, _ = self.pages.shape
        tile = min(self.tiles.queries, pl.next_power_of_2(T))
        keys = self.tiles.decode_keys if T == 1 else self.tiles.prefill_keys
        return Static(
            **{"bounded": False, "window": None, "sinks": False, **mode},
            tile=tile,
            tiles_per_row=pl.cdiv(T, tile),
            block_pages=max(1, min(keys // S, N)),
            page_size=S,
            pages_per_row=N,
            kv_heads=all_kv_heads if self.own_kv_heads is None else self.own_kv_heads,
            all_kv_heads=all_kv_heads,
        )

    def group(self, static: Static) -> int:
        return self.q.shape[2] // static.kv_heads

    def rows(self, static: Static) -> int:
        """M: rows of one program, padded to whole registers of q's dtype."""
        sublanes = 32 // self.q.dtype.itemsize
        return pl.cdiv(self.group(static) * static.tile, sublanes) * sublanes

    def tiled(self, static: Static) -> jax.Array:
        """q as `[programs, KH, M, D]`, rows group-major: row r of a tile is its query r % tile."""
        B, T, _, D = self.q.shape
        tile, tiles, G = static.tile, static.tiles_per_row, self.group(static)
        q = jnp.pad(self.q, ((0, 0), (0, tiles * tile - T), (0, 0), (0, 0)))
        q = q.reshape(B, tiles, tile, static.kv_heads, G, D).transpose(0, 1, 3, 4, 2, 5)
        q = q.reshape(B * tiles, static.kv_heads, G * tile, D)
        return jnp.pad(q, ((0, 0), (0, 0), (0, self.rows(static) - G * tile), (0, 0)))

    def tokens(self, static: Static, out: jax.Array) -> jax.Array:
        """`[programs, KH, M, ...]` back to `[B, T, heads, ...]`."""
        B, T, H, _ = self.q.shape
        tile, tiles, G = static.tile, static.tiles_per_row, self.group(static)
        rest = out.shape[3:]
        out = out[:, :, : G * tile].reshape(B, tiles, static.kv_heads, G, tile, *rest)
        out = jnp.moveaxis(out, 4, 2)
        return out.reshape(B, tiles * tile, H, *rest)[:, :T]

    def heads_of_lanes(self, static: Static, statistic: jax.Array) -> jax.Array:
        """`[programs, KH / LANES, M, LANES]`, a head in each lane -> `[B, T, heads]`."""
        by_head = statistic.transpose(0, 1, 3, 2).reshape(statistic.shape[0], -1, self.rows(static))
        return self.tokens(static, by_head[:, : static.kv_heads])

    def bounds(self, static: Static, seen_from: jax.Array) -> jax.Array:
        """`[B, T]` to `[programs, M, LANES]`, equal in all lanes."""
        B, T = seen_from.shape
        tile, tiles, G = static.tile, static.tiles_per_row, self.group(static)
        bound = jnp.pad(seen_from, ((0, 0), (0, tiles * tile - T))).reshape(B * tiles, tile)
        bound = jnp.tile(bound, (1, G))
        bound = jnp.pad(bound, ((0, 0), (0, self.rows(static) - G * tile)))
        return jnp.broadcast_to(bound[:, :, None], (*bound.shape, LANES))

    def rows_of_heads(self, static: Static, sinks: jax.Array) -> jax.Array:
        """`[heads]` to `[KH, M, LANES]` float32, for the rows of any program."""
        of_rows = jnp.repeat(
            sinks.astype(jnp.float32).reshape(static.kv_heads, -1), static.tile, axis=1
        )
        of_rows = jnp.pad(of_rows, ((0, 0), (0, self.rows(static) - of_rows.shape[1])))
        return jnp.broadcast_to(of_rows[:, :, None], (*of_rows.shape, LANES))

    def run(
        self,
        static: Static,
        page_table: jax.Array,
        first: jax.Array,
        end: jax.Array,
        query: jax.Array,
        first_kv_head: jax.Array | None,
        seen_from: jax.Array | None,
        sinks: jax.Array | None = None,
    ) -> list[jax.Array]:
        """The kernel's outputs; first, end and query are of each program."""
        D, KH, M, S = self.q.shape[3], static.kv_heads, self.rows(static), static.page_size
        programs = self.q.shape[0] * static.tiles_per_row
        cores = self.tiles.cores if programs % self.tiles.cores == 0 else 1
        head = jnp.zeros((), jnp.int32) if first_kv_head is None else first_kv_head
        scalars = Scalars(
            page_table.reshape(-1),
            first.reshape(-1),
            end.reshape(-1),
            query.reshape(-1),
            head.reshape(1),
        )

        def of_program(*shape: int) -> pl.BlockSpec:
            zeros = (0,) * len(shape)
            return pl.BlockSpec(
                (None, *shape), lambda c, i, *_: (c * (programs // cores) + i, *zeros)
            )

        q = self.tiled(static)
        operands, in_specs = [q], [of_program(KH, M, D)]
        if seen_from is not None:
            operands.append(self.bounds(static, seen_from))
            in_specs.append(of_program(M, LANES))
        if sinks is not None:
            operands.append(self.rows_of_heads(static, sinks))
            in_specs.append(pl.BlockSpec((KH, M, LANES), lambda *_: (0, 0, 0)))
        out_shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype if static.causal else jnp.float32)]
        out_specs = [of_program(KH, M, D)]
        if not static.causal:
            parts = pl.cdiv(KH, LANES)
            statistic = jax.ShapeDtypeStruct((programs, parts, M, LANES), jnp.float32)
            out_shapes += [statistic] * 2
            out_specs += [of_program(parts, M, LANES)] * 2
        return pl.pallas_call(
            functools.partial(kernel, static),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(cores, programs // cores),
                in_specs=[*in_specs, pl.BlockSpec(memory_space=pl.ANY)],
                out_specs=out_specs,
                scratch_shapes=[
                    pltpu.VMEM((2, static.block_pages, 2, KH, S, D), self.pages.dtype),
                    pltpu.SemaphoreType.DMA((2,)),
                    pltpu.SMEM((1,), jnp.int32),
                    pltpu.VMEM((KH, M, LANES), jnp.float32),
                    pltpu.VMEM((KH, M, LANES), jnp.float32),
                    pltpu.VMEM((KH, M, D), jnp.float32),
                ],
            ),
            out_shape=out_shapes,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"),
                vmem_limit_bytes=self.tiles.vmem_limit_bytes,
            ),
            cost_estimate=self.cost_of_full_pages(static, q, out_shapes),
            interpret=self.interpret,
            name="paged_attention",
        )(*scalars, *operands, self.pages)

    def cost_of_full_pages(
        self, static: Static, q: jax.Array, outputs: list[jax.ShapeDtypeStruct]
    ) -> pl.CostEstimate:
        """For XLA's scheduler: as if every row filled its page table."""
        programs, kv_heads, M, D = q.shape
        keys = static.pages_per_row * static.page_size
        products = programs * kv_heads * M * keys
        kv = 2 * programs * kv_heads * keys * D * self.pages.dtype.itemsize
        moved = q.size * q.dtype.itemsize + sum(o.size * o.dtype.itemsize for o in outputs)
        return pl.CostEstimate(
            flops=4 * products * D, transcendentals=products, bytes_accessed=kv + moved
        )
