"""Storing K and V in their pages on TPUs (Pallas, Mosaic), in place.

Tiling: one program is one group of slots of one row: K and V of all KV heads, [2, KH, slots, D].
One new token a row touches one group of `DECODE_SLOTS` slots; many touch whole pages.
VMEM: the group before and after, and its new tokens, each twice (the grid's pipeline).
SMEM: page, group and range of new slots of every program (prefetched scalars).
Slots lie along sublanes, of which DMA moves no fraction, so a group is read, merged and written
back: (2 * slots + new) * 4 * KH * D bytes a program in bfloat16, no FLOPs, bound by HBM. For one
token that is a thirtieth of what attention then reads at 1024 positions.
XLA's scatter is no choice here: it wants the slots major and would transpose the pool.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

DECODE_SLOTS = 16
"""Slots rewritten for one token: bfloat16's tile has 16 sublanes."""


@functools.partial(jax.jit, static_argnames=("interpret",))
def kv_write(
    pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    page_table: jax.Array,
    q_start: jax.Array,
    q_lens: jax.Array,
    *,
    interpret: Any = False,
) -> jax.Array:
    """See `api.kv_write`; `interpret` runs the kernel in Pallas' interpreter."""
    B, T = k.shape[:2]
    _, _, KH, S, D = pages.shape
    slots = DECODE_SLOTS if T == 1 and S % DECODE_SLOTS == 0 else S
    # A run of T tokens that starts anywhere touches at most this many groups.
    groups = (T + slots - 2) // slots + 1
    first_group = q_start // slots

    # Programs are rows x groups. Slots first .. end - 1 of a program's group get new tokens.
    number = first_group[:, None] + jnp.arange(groups, dtype=jnp.int32)
    first = jnp.clip(q_start[:, None] - number * slots, 0, slots)
    end = jnp.clip((q_start + q_lens)[:, None] - number * slots, 0, slots)
    groups_per_page = S // slots
    page = jnp.take_along_axis(page_table, number // groups_per_page, axis=1, mode="clip")
    page = jnp.where(first < end, page, 0)

    kv = jnp.stack([k, v], axis=1).astype(pages.dtype)  # [B, 2, T, KH, D]
    if T == 1:
        new = kv.transpose(0, 1, 3, 2, 4)
    else:
        token = jnp.arange(groups * slots, dtype=jnp.int32) - (q_start % slots)[:, None]
        new = jnp.take_along_axis(kv, token[:, None, :, None, None], axis=2, mode="clip").reshape(
            B, 2, groups, slots, KH, D
        )
        new = new.transpose(0, 2, 1, 4, 3, 5).reshape(B * groups, 2, KH, slots, D)

    group = pl.BlockSpec(
        (None, 2, KH, slots, D), lambda i, page, number, *_: (page[i], 0, 0, number[i], 0)
    )
    return pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(B * groups,),
            in_specs=[
                pl.BlockSpec((None, *new.shape[1:]), lambda i, *_: (i, 0, 0, 0, 0)),
                group,
            ],
            out_specs=group,
        ),
        out_shape=jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        input_output_aliases={5: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=(new.size + 4 * B * groups * KH * slots * D) * pages.dtype.itemsize,
        ),
        interpret=interpret,
        name="kv_write",
    )(
        page.reshape(-1),
        (number % groups_per_page).reshape(-1),
        first.reshape(-1),
        end.reshape(-1),
        new,
        pages,
    )


def _kernel(
    page_ref: Any,
    number_ref: Any,
    first_ref: Any,
    end_ref: Any,
    new_ref: Any,
    old_ref: Any,
    out_ref: Any,
) -> None:
    del page_ref, number_ref
    i = pl.program_id(0)
    slot = lax.broadcasted_iota(jnp.int32, old_ref.shape, 2)
    is_new = (slot >= first_ref[i]) & (slot < end_ref[i])
    out_ref[...] = jnp.where(is_new, new_ref[...], old_ref[...])
