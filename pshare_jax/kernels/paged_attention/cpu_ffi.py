"""Paged attention in C++; `kernels/native/src/attention.h` says how it goes about it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pshare_jax.kernels.kv_dtype import FP8
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
    sinks: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """See `api.paged_attention`; one device.

    In bfloat16 the queries and the weights of the softmax are rounded to bfloat16. Pages of 8 bits
    are widened to the queries' dtype, others are of it.

    Raises:
        ConfigError: the C++ library cannot be had on this machine.
    """
    del mesh
    require_library()
    dtype = q.dtype if pages.dtype == FP8 else pages.dtype
    call = jax.ffi.ffi_call("pshare_paged_attention", jax.ShapeDtypeStruct(q.shape, dtype))
    out = call(
        q.astype(dtype),
        pages,
        page_table,
        q_start,
        q_lens,
        jnp.zeros(0, jnp.float32) if sinks is None else sinks.astype(jnp.float32),
        window=np.int64(sliding_window or 0),
        soft_cap=np.float32(soft_cap or 0.0),
    )
    return out.astype(q.dtype)
