"""Moving pages in plain XLA: a loop over pages that copies contiguous slices, layer by layer.

Slices rather than gathers and scatters, because on CPUs those read their operand through a
temporary of the size of all pages moved, and move it several times more slowly.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def gather_pages(pool: tuple[jax.Array, ...], indices: jax.Array) -> jax.Array:
    """See `api.gather_pages`."""
    page_shape = pool[0].shape[1:]
    count = indices.shape[0]

    def copy(i: jax.Array, staged: jax.Array) -> jax.Array:
        for layer, pages in enumerate(pool):
            page = lax.dynamic_index_in_dim(pages, indices[i])
            staged = lax.dynamic_update_slice(staged, page[None], (layer, i, 0, 0, 0, 0))
        return staged

    staged = jnp.zeros((len(pool), count, *page_shape), pool[0].dtype)
    return lax.fori_loop(0, count, copy, staged)


def scatter_pages(
    pool: tuple[jax.Array, ...], staged: jax.Array, indices: jax.Array
) -> tuple[jax.Array, ...]:
    """See `api.scatter_pages`."""
    page_shape = staged.shape[2:]

    def copy(i: jax.Array, pool: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(
            lax.dynamic_update_index_in_dim(
                pages,
                lax.dynamic_slice(staged, (layer, i, 0, 0, 0, 0), (1, 1, *page_shape))[0].astype(
                    pages.dtype
                ),
                indices[i],
                axis=0,
            )
            for layer, pages in enumerate(pool)
        )

    return lax.fori_loop(0, indices.shape[0], copy, tuple(pool))


def copy_pages(
    pool: tuple[jax.Array, ...], src: jax.Array, dst: jax.Array
) -> tuple[jax.Array, ...]:
    """See `api.copy_pages`."""

    def copy(i: jax.Array, pool: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(
            lax.dynamic_update_index_in_dim(
                pages, lax.dynamic_index_in_dim(pages, src[i]), dst[i], axis=0
            )
            for pages in pool
        )

    return lax.fori_loop(0, src.shape[0], copy, tuple(pool))


def page_checksums(staged: jax.Array) -> jax.Array:
    """See `api.page_checksums`."""
    layers, _, *page_shape = staged.shape
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[staged.dtype.itemsize]
    words = lax.bitcast_convert_type(staged, unsigned).astype(jnp.uint32)
    # The number of each value within its page: a sum of iotas, so that a sharded axis stays so.
    sizes = (layers, 1, *page_shape)
    number = jnp.zeros(sizes, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(sizes))):
        number += jnp.uint32(stride) * lax.broadcasted_iota(jnp.uint32, sizes, axis)
        stride *= sizes[axis]
    axes = [axis for axis in range(staged.ndim) if axis != 1]
    return jnp.sum(words * (2 * number + 1), axis=axes, dtype=jnp.uint32)
