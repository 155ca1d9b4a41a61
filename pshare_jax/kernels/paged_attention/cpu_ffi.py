"""Paged attention in C++; `kernels/native/src/attention.h` says how it goes about it."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from pshare_jax.kernels.native.library import require_library


def paged_attention(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    q_start: jax.Array,
    q_lens: jax.Array,
    *,
    sliding_window: int | None,
    soft_cap: float | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """See `api.paged_attention`; one device.

    In bfloat16 the queries and the weights of the softmax are rounded to bfloat16.

    Raises:
        ConfigError: the C++ library cannot be had on this machine.
    """
    del mesh
    require_library()
    call = jax.ffi.ffi_call("pshare_paged_attention", jax.ShapeDtypeStruct(q.shape, pages.dtype))
    out = call(
        q.astype(pages.dtype),
        pages,
        page_table,
        q_start,
        q_lens,
        window=np.int64(sliding_window or 0),
        soft_cap=np.float32(soft_cap or 0.0),
    )
    return out.astype(q.dtype)
