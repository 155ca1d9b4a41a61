"""What `bench compile` compiles of shared-prefix decode attention: one layer on one device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pshare_jax.bench.accelerators import Accelerator
from pshare_jax.bench.compile_kernels import KERNEL_POOL_BYTES, KernelCase
from pshare_jax.bench.compile_programs import Program, abstract, bytes_per_device
from pshare_jax.core.shared_runs import max_groups
from pshare_jax.kernels.kv_write.api import kv_write
from pshare_jax.kernels.paged_attention.api import paged_attention
from pshare_jax.kernels.shared_prefix_attention.api import shared_prefix_attention
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.runtime.steps import Rows, Runs
from pshare_jax.sharding.rules import replicated

SHARED_CASES = (
    KernelCase(32, 1, 32, 8, 128, 32),
    KernelCase(128, 1, 5, 1, 128, 256),
    KernelCase(8, 1, 9, 3, 64, 16, "float32", sliding_window=100, soft_cap=50.0),
    KernelCase(8, 1, 40, 8, 80, 64),
    KernelCase(4, 1, 12, 12, 96, 128, sliding_window=4096),
    KernelCase(2, 1, 16, 2, 256, 256, soft_cap=30.0),
)
"""Every head size, with and without a window, more rows than one tile, both dtypes."""


def attention_program(
    accelerator: Accelerator, case: KernelCase, positions: int, *, shared: bool
) -> Program:
    """`kv_write`, then decode attention over tables of `positions`, on one device.

    Args:
        accelerator: what is compiled for.
        case: one token a row.
        positions: that each row's page table holds.
        shared: whether the attention is `shared_prefix_attention`, with as many groups as the
            engine has for so many rows, or `paged_attention`.
    """
    mesh = Mesh(accelerator.devices()[:1], ("tensor",))
    everywhere = replicated(mesh)
    dtype = jnp.dtype(case.dtype)
    layout = PageLayout(1, case.kv_heads, case.head_dim, case.page_size, dtype)
    placement = layout.placement(everywhere)
    shape = layout.layer_shape(KERNEL_POOL_BYTES // layout.bytes_per_page)
    pages = abstract(shape, dtype, placement)
    options: dict[str, Any] = {
        "sliding_window": case.sliding_window,
        "soft_cap": case.soft_cap,
        "mesh": mesh,
        "backend": accelerator.backend,
    }

    def write_and_attend(
        pages: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows, runs: Runs
    ) -> tuple[jax.Array, jax.Array]:
        pages = kv_write(pages, k, v, *rows, mesh=mesh, backend=accelerator.backend)
        if shared:
            return pages, shared_prefix_attention(q, pages, *rows, *runs, **options)
        return pages, paged_attention(q, pages, *rows, **options)

    def ints(*shape: int) -> Any:
        return abstract(shape, jnp.int32, everywhere)

    batch, groups = case.batch, max_groups(case.batch)
    q = abstract((batch, 1, case.heads, case.head_dim), dtype, everywhere)
    kv = abstract((batch, 1, case.kv_heads, case.head_dim), dtype, everywhere)
    rows = Rows(ints(batch, layout.pages_for(positions)), ints(batch), ints(batch))
    return Program(
        f"shared prefix: {case}" if shared else str(case),
        jax.jit(write_and_attend, donate_argnums=0, out_shardings=(placement, everywhere)),
        (pages, q, kv, kv, rows, Runs(ints(groups, batch), ints(groups))),
        pool_bytes=bytes_per_device(pages),
    )
