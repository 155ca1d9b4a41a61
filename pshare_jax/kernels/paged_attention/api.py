"""Causal attention over paged KV."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from pshare_jax.kernels.backends import select_backend
from pshare_jax.kernels.over_heads import attention_over_heads
from pshare_jax.kernels.paged_attention import cpu_ffi, pallas_gpu, pallas_tpu, reference, xla

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_TPU = (pallas_tpu.paged_attention, pallas_tpu.TILES, pallas_tpu.Tiles())
_GPU = (pallas_gpu.paged_attention, pallas_gpu.TILES, pallas_gpu.Tiles())

BACKENDS = {
    "xla": xla.paged_attention,
    "reference": reference.paged_attention,
    "cpu_ffi": cpu_ffi.paged_attention,
    "pallas_tpu": attention_over_heads(*_TPU),
    "pallas_gpu": attention_over_heads(*_GPU),
    "pallas_tpu_interpret": attention_over_heads(*_TPU, interpret=True),
    "pallas_gpu_interpret": attention_over_heads(*_GPU, interpret=True),
}


# Under jit: layers alike are traced once, and a program has them once, which XLA inlines.
@functools.partial(jax.jit, static_argnames=("sliding_window", "soft_cap", "mesh", "backend"))
def paged_attention(
    q: Float[Array, "B T heads head_dim"],
    pages: Float[Array, "num_pages 2 kv_heads page_size head_dim"],
    page_table: Int[Array, "B N"],
    q_start: Int[Array, " B"],
    q_lens: Int[Array, " B"],
    *,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    mesh: Mesh | None = None,
    backend: str = "auto",
) -> Float[Array, "B T heads head_dim"]:
    """Each row's queries attend to that row's KV, their own positions included.

    Query i of row b (i < q_lens[b]) is at position p = q_start[b] + i and sees the key positions
    j <= p, with a sliding window only those with j > p - sliding_window. Position j lies in page
    `page_table[b, j // page_size]`, slot `j % page_size`. The KV of the queries themselves must
    have been written before (`kv_write`). Scores are scaled by 1 / sqrt(head_dim), then, with a
    soft cap c, bounded to c * tanh(score / c) (Gemma 2, arXiv 2408.00118); sums are accumulated in
    float32. Slots that no query of a row sees may hold anything, NaN included.

    Args:
        q: `[B, T, heads, head_dim]`, float32 or bfloat16; rotated.
        pages: `[num_pages, 2, kv_heads, page_size, head_dim]`; heads is a multiple of kv_heads,
            and query head h reads KV head h // (heads // kv_heads).
        page_table: `[B, N]` int32.
        q_start: `[B]` int32, position of each row's first query.
        q_lens: `[B]` int32, number of valid queries, 0 .. T.
        sliding_window: number of most recent positions a query sees (itself included), or None.
        soft_cap: bound of the scores' size, or None.
        sinks: `[heads]`, a score of each head's that takes weight and gives nothing (arXiv
            2309.17453), or None.
        mesh: the mesh that the arrays live on, as `sharding/rules.py` lays them out; None for one
            device. Pallas backends need it to split their work and to choose tile sizes.
        backend: a key of `BACKENDS`, or `auto`.

    Returns:
        `[B, T, heads, head_dim]` of q's dtype. Queries past q_lens give finite garbage.

    Raises:
        ValueError: an unknown backend, or heads that are no multiple of kv_heads.
    """
    heads, kv_heads = q.shape[2], pages.shape[2]
    if heads % kv_heads:
        raise ValueError(f"paged_attention: {heads} heads are no multiple of {kv_heads} KV heads")
    attend = select_backend("paged_attention", BACKENDS, backend)
    return attend(
        q,
        pages,
        page_table,
        q_start,
        q_lens,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
        mesh=mesh,
    )
