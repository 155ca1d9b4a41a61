"""Shared-prefix attention for TPUs: `paged_attention.tpu_kernel` over runs, then over tails.

Tiling: over runs, a program is up to `Tiles.queries` members of one group with all their KV heads
(M = members x query heads of a KV head); a run is divided among the TensorCores of a device, so
that a single group keeps both busy. Over tails, a program is one row. Unused groups cost a program
each that copies and computes nothing.
VMEM: queries [KH, M, D], their float32 result and softmax state, and two block buffers, about
8 MiB for 32 members of a group of 4 with 8 KV heads of 128. SMEM: page tables and key ranges.
Intensity: M FLOPs a byte of the run's pages, where plain decode has the group alone: 32 members of
a group of 4 have 128, still bound by HBM (240 on a v5e), of which they read a 32nd.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from pshare_jax.kernels.paged_attention.pallas_tpu import Tiles, partial_attention
from pshare_jax.kernels.shared_prefix_attention import two_passes


@functools.partial(
    # One trace and one lowering for all layers of a step.
    jax.jit,
    static_argnames=("sliding_window", "soft_cap", "kv_heads", "tiles", "interpret"),
)
def shared_prefix_attention(
    q: jax.Array, pages: jax.Array, *rows: jax.Array, tiles: Tiles | None = None, **options: Any
) -> jax.Array:
    """See `api.shared_prefix_attention`; further arguments as in `pallas_tpu.paged_attention`."""
    tiles = tiles or Tiles()
    return two_passes.shared_prefix_attention(
        partial_attention, tiles.cores, q, pages, *rows, tiles=tiles, **options
    )
