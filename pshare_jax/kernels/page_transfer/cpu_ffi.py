"""Moving pages in C++, by copies of whole pages.

XLA would do, but for bfloat16: its CPU compiler converts a whole pool to float32 and back for that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pshare_jax.kernels.native.library import require_library

Pool = tuple[jax.Array, ...]


def gather_pages(pool: Pool, indices: jax.Array) -> jax.Array:
    """See `api.gather_pages`; one device.

    Raises:
        ConfigError: the C++ library cannot be had on this machine.
    """
    require_library()
    shape = (len(pool), indices.shape[0], *pool[0].shape[1:])
    out = jax.ShapeDtypeStruct(shape, pool[0].dtype)
    return jax.ffi.ffi_call("pshare_gather_pages", out)(*pool, indices)


def scatter_pages(pool: Pool, staged: jax.Array, indices: jax.Array) -> Pool:
    """See `api.scatter_pages`; one device. Raises as `gather_pages`."""
    return _in_place("pshare_scatter_pages", pool, staged.astype(pool[0].dtype), indices)


def copy_pages(pool: Pool, src: jax.Array, dst: jax.Array) -> Pool:
    """See `api.copy_pages`; one device. Raises as `gather_pages`."""
    return _in_place("pshare_copy_pages", pool, src, dst)


def page_checksums(staged: jax.Array, *, alone: bool = False) -> jax.Array:
    """See `api.page_checksums`; one device. Raises as `gather_pages`."""
    require_library()
    out = jax.ShapeDtypeStruct((staged.shape[1],), jnp.uint32)
    return jax.ffi.ffi_call("pshare_page_checksums", out)(staged, alone=alone)


def _in_place(target: str, pool: Pool, *operands: jax.Array) -> Pool:
    require_library()
    out = [jax.ShapeDtypeStruct(pages.shape, pages.dtype) for pages in pool]
    aliases = {layer: layer for layer in range(len(pool))}
    call = jax.ffi.ffi_call(target, out, input_output_aliases=aliases)
    return tuple(call(*pool, *operands))
