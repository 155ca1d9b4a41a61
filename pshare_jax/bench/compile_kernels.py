"""The kernels that `bench compile` compiles alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pshare_jax.bench.accelerators import Accelerator
from pshare_jax.bench.compile_programs import Program, abstract, bytes_per_device
from pshare_jax.kernels.kv_write.api import kv_write
from pshare_jax.kernels.paged_attention.api import paged_attention
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.runtime.steps import Rows
from pshare_jax.sharding.rules import replicated


@dataclass(frozen=True)
class KernelCase:
    """One shape that the kernels must compile for."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: str = "bfloat16"
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False

    def __str__(self) -> str:
        parts = [
            f"{self.batch}x{self.tokens} queries, {self.heads}/{self.kv_heads} heads of "
            f"{self.head_dim}, pages of {self.page_size}, {self.dtype}"
        ]
        if self.sliding_window is not None:
            parts.append(f"window {self.sliding_window}")
        if self.soft_cap is not None:
            parts.append(f"soft cap {self.soft_cap:g}")
        if self.sinks:
            parts.append("sinks")
        return ", ".join(parts)


KERNEL_CASES = (
    KernelCase(32, 1, 32, 8, 128, 32),
    KernelCase(1, 512, 32, 8, 128, 32),
    KernelCase(32, 1, 5, 1, 128, 256),
    KernelCase(8, 1, 9, 3, 64, 16, "float32"),
    KernelCase(2, 100, 9, 3, 64, 16, "float32", sliding_window=100, soft_cap=50.0),
    KernelCase(8, 1, 40, 8, 80, 64),
    KernelCase(4, 64, 12, 12, 96, 128, sliding_window=4096),
    KernelCase(8, 1, 16, 2, 256, 256, soft_cap=30.0),
    KernelCase(2, 200, 16, 2, 256, 64),
    # gpt-oss.
    KernelCase(32, 1, 64, 8, 64, 32, sliding_window=128, sinks=True),
    KernelCase(1, 512, 64, 8, 64, 32, sinks=True),
)
"""Every head size, page sizes from end to end, decode and chunks, both dtypes."""


KERNEL_POOL_BYTES = 2**29
"""Larger than on-chip memory, where a copy of the pages would not be counted."""


def kernel_program(accelerator: Accelerator, case: KernelCase) -> Program:
    """`kv_write`, then `paged_attention`, on one device."""
    mesh = Mesh(accelerator.devices()[:1], ("tensor",))
    everywhere = replicated(mesh)
    dtype = jnp.dtype(case.dtype)
    layout = PageLayout(1, case.kv_heads, case.head_dim, case.page_size, dtype)
    num_pages = KERNEL_POOL_BYTES // layout.bytes_per_page
    placement = layout.placement(everywhere)
    pages = abstract(layout.layer_shape(num_pages), dtype, placement)
    width = layout.pages_for(2048)

    def write_and_attend(
        pages: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        rows: Rows,
        sinks: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        pages = kv_write(pages, k, v, *rows, mesh=mesh, backend=accelerator.backend)
        out = paged_attention(
            q,
            pages,
            *rows,
            sliding_window=case.sliding_window,
            soft_cap=case.soft_cap,
            sinks=sinks,
            mesh=mesh,
            backend=accelerator.backend,
        )
        return pages, out

    def tokens(heads: int) -> Any:
        return abstract((case.batch, case.tokens, heads, case.head_dim), dtype, everywhere)

    def ints(*shape: int) -> Any:
        return abstract(shape, jnp.int32, everywhere)

    kv = tokens(case.kv_heads)
    sinks = abstract((case.heads,), jnp.float32, everywhere) if case.sinks else None
    rows = Rows(ints(case.batch, width), ints(case.batch), ints(case.batch))
    return Program(
        str(case),
        jax.jit(write_and_attend, donate_argnums=0, out_shardings=(placement, everywhere)),
        (pages, tokens(case.heads), kv, kv, rows, sinks),
        pool_bytes=bytes_per_device(pages),
    )
