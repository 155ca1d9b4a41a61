"""Storing K and V in C++: copies the new tokens into their slots, in place."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from pshare_jax.kernels.native.library import require_library


def kv_write(
    pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    page_table: jax.Array,
    q_start: jax.Array,
    q_lens: jax.Array,
    *,
    mesh: Mesh | None = None,
) -> jax.Array:
    """See `api.kv_write`; one device.

    Raises:
        ConfigError: the C++ library cannot be had on this machine.
    """
    del mesh
    require_library()
    call = jax.ffi.ffi_call(
        "pshare_kv_write",
        jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        input_output_aliases={0: 0},
    )
    k, v = k.astype(pages.dtype), v.astype(pages.dtype)
    return call(pages, k, v, page_table, q_start, q_lens)
