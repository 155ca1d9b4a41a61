"""Storing new K and V in their pages."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from pshare_jax.kernels.backends import select_backend
from pshare_jax.kernels.kv_dtype import as_kv
from pshare_jax.kernels.kv_write import cpu_ffi, pallas_tpu, reference, xla
from pshare_jax.kernels.over_heads import write_over_heads

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

BACKENDS = {
    "xla": xla.kv_write,
    "reference": reference.kv_write,
    "cpu_ffi": cpu_ffi.kv_write,
    "pallas_tpu": write_over_heads(pallas_tpu.kv_write),
    # On GPUs XLA's scatter is one kernel that writes the new tokens in place and nothing else.
    "pallas_gpu": xla.kv_write,
    "pallas_tpu_interpret": write_over_heads(pallas_tpu.kv_write, interpret=True),
    "pallas_gpu_interpret": xla.kv_write,
}


# Under jit: layers alike are traced once, and a program has them once, which XLA inlines.
@functools.partial(jax.jit, static_argnames=("mesh", "backend"))
def kv_write(
    pages: Float[Array, "num_pages 2 kv_heads page_size head_dim"],
    k: Float[Array, "B T kv_heads head_dim"],
    v: Float[Array, "B T kv_heads head_dim"],
    page_table: Int[Array, "B N"],
    q_start: Int[Array, " B"],
    q_lens: Int[Array, " B"],
    *,
    mesh: Mesh | None = None,
    backend: str = "auto",
) -> Float[Array, "num_pages 2 kv_heads page_size head_dim"]:
    """Stores row b's tokens i < q_lens[b] at positions q_start[b] + i.

    Position j goes to page `page_table[b, j // page_size]`, slot `j % page_size`. Tokens past
    q_lens may be written to page 0, nowhere else. No two rows may own the same page. The update
    is in place when `pages` is donated to the surrounding jit.

    Args:
        pages: `[num_pages, 2, kv_heads, page_size, head_dim]`.
        k: `[B, T, kv_heads, head_dim]`, rotated; rounded to the dtype of pages, see `as_kv`.
        v: `[B, T, kv_heads, head_dim]`.
        page_table: `[B, N]` int32.
        q_start: `[B]` int32, position of each row's first token.
        q_lens: `[B]` int32, number of valid tokens, 0 .. T.
        mesh: the mesh that the arrays live on, as `sharding/rules.py` lays them out; None for one
            device. Pallas backends need it to split their work.
        backend: a key of `BACKENDS`, or `auto`.

    Returns:
        The updated pages.

    Raises:
        ValueError: an unknown backend.
    """
    write = select_backend("kv_write", BACKENDS, backend)
    k, v = as_kv(k, pages.dtype), as_kv(v, pages.dtype)
    return write(pages, k, v, page_table, q_start, q_lens, mesh=mesh)
