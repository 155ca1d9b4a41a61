"""What `bench compile` compiles: kernels alone, and the engine's steps on abstract weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from pshare_jax.bench.accelerators import Accelerator
from pshare_jax.core.messages import SamplingParams
from pshare_jax.core.shared_runs import max_groups
from pshare_jax.kernels.kv_write.api import kv_write
from pshare_jax.kernels.page_transfer.api import gather_pages, scatter_pages
from pshare_jax.kernels.paged_attention.api import paged_attention
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.weights import projection_specs, weight_specs
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.runtime.sampler import empty_history, pack_rows
from pshare_jax.runtime.steps import DecodeInput, Rows, Runs, StepSpec, decode_steps, prefill_chunk
from pshare_jax.sharding.mesh import carve
from pshare_jax.sharding.rules import pool_sharding, replicated, weight_shardings

DTYPE = jnp.bfloat16


@dataclass(frozen=True)
class Sizes:
    """Sizes of the compiled steps.

    Args:
        batch: rows of the decode step.
        context: positions that each row's page table holds.
        chunk: tokens of the prefill chunk.
        page_size: token slots of a page.
        transfer: pages of one handoff call.
        train_batch: rows of a training micro-batch.
        train_prompt: tokens of each row that the prefill module reads, and the first decode token.
        train_answer: answer tokens of each row.
    """

    batch: int = 32
    context: int = 4096
    chunk: int = 512
    page_size: int = 32
    transfer: int = 64
    train_batch: int = 8
    train_prompt: int = 2048
    train_answer: int = 256


@dataclass(frozen=True)
class Program:
    """One computation to compile.

    Args:
        name: its name in tables.
        function: under jit.
        arguments: abstract.
        weight_bytes: of one device.
        pool_bytes: KV pages of one device.
        bytes_per_token: KV of one token on one device.
        least_bytes: bytes that one device must move at least, live KV of `Sizes.context` included.
        least_flops: operations of one device.
        resident_bytes: what else lies in one device's memory while it runs.
        mesh: sizes of the axes `data`, `fsdp` and `tensor`, of a training program only.
        compiler_options: XLA's, where they are not the defaults.
        pages_read: KV that a decode step reads from pages, in bytes of one device.
    """

    name: str
    function: Any
    arguments: tuple
    weight_bytes: int = 0
    pool_bytes: int = 0
    bytes_per_token: int = 0
    least_bytes: float = 0.0
    least_flops: float = 0.0
    resident_bytes: int = 0
    mesh: str = ""
    compiler_options: Mapping[str, float] = field(default_factory=dict)
    pages_read: float = 0.0


def abstract(shape: tuple[int, ...], dtype: Any, sharding: Sharding | Format) -> Any:
    """A ShapeDtypeStruct, typed as what the traced function sees."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def bytes_per_device(arrays: Any) -> int:
    """Bytes of the arrays of a pytree on one device."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * jnp.dtype(a.dtype).itemsize
        for a in jax.tree.leaves(arrays)
    )


class Side:
    """One mesh of one model: its weights and its pool, which takes half of what weights leave."""

    def __init__(self, accelerator: Accelerator, config: ModelConfig, mesh: Mesh, sizes: Sizes):
        self.config, self.mesh, self.sizes = config, mesh, sizes
        specs = weight_specs(config)
        shardings = weight_shardings(mesh, specs)
        self.weights = {
            name: abstract(spec.shape, DTYPE, shardings[name]) for name, spec in specs.items()
        }
        self.layout = PageLayout.of(config, sizes.page_size, DTYPE)
        self.pages_sharding = pool_sharding(mesh, config.num_kv_heads)
        self.pages = self.layout.placement(self.pages_sharding)
        one_page = bytes_per_device(self.pool(1))
        self.num_pages = int(
            0.5 * (accelerator.memory - bytes_per_device(self.weights)) // one_page
        )
        self.bytes_per_token = one_page // sizes.page_size
        self.everywhere = replicated(mesh)
        self.spec = StepSpec(config, accelerator.backend, mesh)

    def pool(self, num_pages: int) -> tuple[Any, ...]:
        """Abstract pages of all layers."""
        shape = self.layout.layer_shape(num_pages)
        one = abstract(shape, DTYPE, self.pages)
        return (one,) * self.config.num_layers

    def ints(self, *shape: int) -> Any:
        """An abstract int32 array on every device."""
        return abstract(shape, jnp.int32, self.everywhere)

    def rows(self, batch: int) -> Rows:
        """Abstract page tables, starts and lengths."""
        width = self.layout.pages_for(self.sizes.context)
        return Rows(self.ints(batch, width), self.ints(batch), self.ints(batch))

    def program(
        self,
        name: str,
        function: Any,
        *arguments: Any,
        least_bytes: float = 0.0,
        least_flops: float = 0.0,
        pages_read: float = 0.0,
    ) -> Program:
        """A program whose first pool-shaped argument is this side's pool."""
        return Program(
            name,
            function,
            arguments,
            weight_bytes=bytes_per_device(self.weights) if self.weights in arguments else 0,
            pool_bytes=bytes_per_device(self.pool(self.num_pages)),
            bytes_per_token=self.bytes_per_token,
            least_bytes=least_bytes,
            least_flops=least_flops,
            pages_read=pages_read,
        )

    def step_floors(self, batch: int, tokens: int, head: bool) -> dict[str, float]:
        """Least bytes and operations of a step that feeds `tokens` a row, the last at `context`."""
        config = self.config
        unread = [] if config.tie_word_embeddings and head else ["embed.embedding"]
        unread += [] if head else ["lm_head.kernel"]
        read = {name: w for name, w in self.weights.items() if name not in unread}
        kernels = sum(math.prod(spec.shape) for spec in projection_specs(config).values())
        products = 2 * config.num_layers * kernels * batch * tokens
        if head:
            products += 2 * config.hidden_size * config.vocab_size * batch * tokens
        seen = tokens * (self.sizes.context - (tokens - 1) / 2)
        attention = 4 * config.num_layers * config.num_heads * config.head_dim * batch * seen
        return {
            "least_bytes": bytes_per_device(read)
            + self.bytes_per_token * batch * self.sizes.context,
            "least_flops": (products + attention) / self.mesh.size,
        }


def step_programs(accelerator: Accelerator, config: ModelConfig, sizes: Sizes) -> Iterator[Program]:
    """The steps of a serving machine: prefill chunk and gather on one mesh, scatter and decode
    step on the other, as the engines jit them."""
    [prefill_mesh], [decode_mesh] = carve(
        accelerator.devices(), 1, accelerator.prefill, 1, accelerator.decode
    )
    prefill = Side(accelerator, config, prefill_mesh, sizes)
    decode = Side(accelerator, config, decode_mesh, sizes)
    yield _prefill_chunk(prefill)
    yield _gather(prefill)
    yield _scatter(decode)
    yield _decode_step(decode, shared=False)
    yield _decode_step(decode, shared=True)


def _prefill_chunk(side: Side) -> Program:
    function = jax.jit(
        functools.partial(prefill_chunk, side.spec),
        donate_argnums=1,
        out_shardings=(side.pages, side.everywhere),
    )
    tokens = side.ints(1, side.sizes.chunk)
    return side.program(
        "prefill chunk",
        function,
        side.weights,
        side.pool(side.num_pages),
        tokens,
        side.rows(1),
        **side.step_floors(1, side.sizes.chunk, head=False),
    )


def _decode_step(side: Side, *, shared: bool) -> Program:
    """One step; with `shared` the executable that reads the pages that rows share once."""
    sizes = side.sizes
    function = jax.jit(
        functools.partial(decode_steps, side.spec, 1),
        donate_argnums=(2, 3),
        out_shardings=(side.pages, side.everywhere, side.everywhere),
    )
    batch = sizes.batch

    def everywhere(tree: Any) -> Any:
        return jax.tree.map(lambda a: abstract(a.shape, a.dtype, side.everywhere), tree)

    history = everywhere(jax.eval_shape(lambda: empty_history(batch, sizes.context)))
    sampling = everywhere(pack_rows([SamplingParams()] * batch, [0] * batch, [0] * batch, batch))
    inputs = DecodeInput(
        tokens=side.ints(batch),
        rows=side.rows(batch),
        slots=side.ints(batch),
        adapter_index=side.ints(batch),
        sampling=sampling,
        num_steps=side.ints(),
    )
    floors = side.step_floors(batch, 1, head=True)
    pages_read = side.bytes_per_token * batch * sizes.context
    name = "decode step"
    if shared:
        groups = max_groups(batch)
        inputs = inputs._replace(runs=Runs(side.ints(groups, batch), side.ints(groups)))
        # At the least all rows share one run.
        saved = side.bytes_per_token * (batch - 1) * sizes.context
        floors["least_bytes"] -= saved
        pages_read -= saved
        name += ", one shared context"
    return side.program(
        name,
        function,
        side.weights,
        None,
        side.pool(side.num_pages),
        history,
        inputs,
        **floors,
        pages_read=pages_read,
    )


def _staged(side: Side) -> Any:
    shape = (side.config.num_layers, *side.layout.layer_shape(side.sizes.transfer))
    sharding = NamedSharding(side.mesh, PartitionSpec(None, *side.pages_sharding.spec))
    return abstract(shape, DTYPE, sharding)


def _gather(side: Side) -> Program:
    staged = _staged(side)
    function = jax.jit(
        functools.partial(gather_pages, backend=side.spec.backend), out_shardings=staged.sharding
    )
    return side.program(
        "handoff: gather",
        function,
        side.pool(side.num_pages),
        side.ints(side.sizes.transfer),
        least_bytes=2 * bytes_per_device(staged),
    )


def _scatter(side: Side) -> Program:
    staged = _staged(side)
    function = jax.jit(
        functools.partial(scatter_pages, backend=side.spec.backend),
        donate_argnums=0,
        out_shardings=side.pages,
    )
    return side.program(
        "handoff: scatter",
        function,
        side.pool(side.num_pages),
        staged,
        side.ints(side.sizes.transfer),
        least_bytes=2 * bytes_per_device(staged),
    )


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

    def __str__(self) -> str:
        parts = [
            f"{self.batch}x{self.tokens} queries, {self.heads}/{self.kv_heads} heads of "
            f"{self.head_dim}, pages of {self.page_size}, {self.dtype}"
        ]
        if self.sliding_window is not None:
            parts.append(f"window {self.sliding_window}")
        if self.soft_cap is not None:
            parts.append(f"soft cap {self.soft_cap:g}")
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
        pages: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows
    ) -> tuple[jax.Array, jax.Array]:
        pages = kv_write(pages, k, v, *rows, mesh=mesh, backend=accelerator.backend)
        out = paged_attention(
            q,
            pages,
            *rows,
            sliding_window=case.sliding_window,
            soft_cap=case.soft_cap,
            mesh=mesh,
            backend=accelerator.backend,
        )
        return pages, out

    def tokens(heads: int) -> Any:
        return abstract((case.batch, case.tokens, heads, case.head_dim), dtype, everywhere)

    def ints(*shape: int) -> Any:
        return abstract(shape, jnp.int32, everywhere)

    kv = tokens(case.kv_heads)
    rows = Rows(ints(case.batch, width), ints(case.batch), ints(case.batch))
    return Program(
        str(case),
        jax.jit(write_and_attend, donate_argnums=0, out_shardings=(placement, everywhere)),
        (pages, tokens(case.heads), kv, kv, rows),
        pool_bytes=bytes_per_device(pages),
    )
