"""Decode attention that reads the pages shared by several rows once for all of them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from pshare_jax.kernels.backends import select_backend
from pshare_jax.kernels.over_heads import attention_over_heads
from pshare_jax.kernels.paged_attention import pallas_gpu as plain_gpu
from pshare_jax.kernels.paged_attention import pallas_tpu as plain_tpu
from pshare_jax.kernels.paged_attention.api import BACKENDS as PLAIN
from pshare_jax.kernels.shared_prefix_attention import pallas_gpu, pallas_tpu, xla
from pshare_jax.kernels.shared_prefix_attention.reference import without_runs

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_TPU = (pallas_tpu.shared_prefix_attention, plain_tpu.TILES, plain_tpu.Tiles())
_GPU = (pallas_gpu.shared_prefix_attention, plain_gpu.TILES, plain_gpu.Tiles())

READS_RUNS_ONCE = {
    "xla": xla.shared_prefix_attention,
    "pallas_tpu": attention_over_heads(*_TPU),
    "pallas_gpu": attention_over_heads(*_GPU),
    "pallas_tpu_interpret": attention_over_heads(*_TPU, interpret=True),
    "pallas_gpu_interpret": attention_over_heads(*_GPU, interpret=True),
}
"""Backends of their own."""

WORTHWHILE = ("pallas_tpu", "pallas_gpu")
"""Those to be used unasked: a second executable of each step is worth its compilation there."""

BACKENDS = {name: READS_RUNS_ONCE.get(name) or without_runs(plain) for name, plain in PLAIN.items()}
"""All names of `paged_attention`: those without a backend of their own give the same numbers by
plain paged attention."""


# Under jit: layers alike are traced once, and a program has them once, which XLA inlines.
@functools.partial(jax.jit, static_argnames=("sliding_window", "soft_cap", "mesh", "backend"))
def shared_prefix_attention(
    q: Float[Array, "B 1 heads head_dim"],
    pages: Float[Array, "num_pages 2 kv_heads page_size head_dim"],
    page_table: Int[Array, "B N"],
    q_start: Int[Array, " B"],
    q_lens: Int[Array, " B"],
    members: Int[Array, "E R"],
    run_lens: Int[Array, " E"],
    *,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    mesh: Mesh | None = None,
    backend: str = "auto",
) -> Float[Array, "B 1 heads head_dim"]:
    """`paged_attention` for one query a row, where groups of rows begin with the same pages.

    Group e are the rows `members[e]`. Their first `run_lens[e]` positions, the run, lie in the same
    pages and are attended to as one batched product; each row's other positions follow
    separately, and the two are merged by log-sum-exp.

    Args:
        q: `[B, 1, heads, head_dim]`, float32 or bfloat16; rotated.
        pages: see `paged_attention`, as all arguments that are not named here.
        page_table: `[B, N]` int32; members of a group agree on the pages of the run that they see.
        q_start: `[B]` int32.
        q_lens: `[B]` int32, 0 or 1; a row of 0 may be a member and is left out.
        members: `[E, R]` int32 row numbers; B marks an empty place. A row is in one group at most.
        run_lens: `[E]` int32, positions of each run: a multiple of the page size, and at most
            `q_start + 1` of every member. 0 for a group that is not used.
        sliding_window: see `paged_attention`.
        soft_cap: see `paged_attention`.
        sinks: see `paged_attention`.
        mesh: see `paged_attention`.
        backend: a key of `BACKENDS`, or `auto`.

    Returns:
        `[B, 1, heads, head_dim]` of q's dtype. Rows of no query give finite garbage.

    Raises:
        ValueError: an unknown backend, several queries a row, heads that are no multiple of
            kv_heads, or groups of which members and run_lens have different numbers.
    """
    tokens, heads, kv_heads = q.shape[1], q.shape[2], pages.shape[2]
    if tokens != 1:
        raise ValueError(f"shared_prefix_attention: takes one query a row, not {tokens}")
    if heads % kv_heads:
        raise ValueError(
            f"shared_prefix_attention: {heads} heads are no multiple of {kv_heads} KV heads"
        )
    if members.shape[0] != run_lens.shape[0]:
        raise ValueError(
            f"shared_prefix_attention: members has {members.shape[0]} groups, "
            f"run_lens {run_lens.shape[0]}"
        )
    attend = select_backend("shared_prefix_attention", BACKENDS, backend)
    return attend(
        q,
        pages,
        page_table,
        q_start,
        q_lens,
        members,
        run_lens,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
        mesh=mesh,
    )
