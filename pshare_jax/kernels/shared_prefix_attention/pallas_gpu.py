"""Shared-prefix attention for NVIDIA GPUs: `paged_attention.pallas_gpu` over runs, then over tails.

Tiling: over runs, a program is up to `Tiles.rows` rows (member, head of the group) of one KV head
of one group; over tails, one row's heads of one KV head, padded to 16. Both loop over blocks of
`Tiles.keys` positions; programs of unused groups loop no times.
Registers and shared memory: as in `paged_attention.pallas_gpu`.
Split-K: a few groups leave multiprocessors idle, so the kernel splits the positions of a run over
programs and merges the parts by log-sum-exp, as the two passes are merged afterwards.
Intensity: one FLOP a row and byte of the run's pages: 64 rows are bound by HBM (300 on an H100).
Members beyond a tile read the same pages at the same time, from L2.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from pshare_jax.kernels.paged_attention.pallas_gpu import Tiles, partial_attention
from pshare_jax.kernels.shared_prefix_attention import two_passes


@functools.partial(
    # One trace and one lowering for all layers of a step.
    jax.jit,
    static_argnames=("sliding_window", "soft_cap", "kv_heads", "tiles", "interpret"),
)
def shared_prefix_attention(
    q: jax.Array, pages: jax.Array, *rows: jax.Array, tiles: Tiles | None = None, **options: Any
) -> jax.Array:
    """See `api.shared_prefix_attention`; further arguments as in `pallas_gpu.paged_attention`."""
    return two_passes.shared_prefix_attention(
        partial_attention, 1, q, pages, *rows, tiles=tiles, **options
    )
