"""Moving pages by definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def gather_pages(pool: tuple[jax.Array, ...], indices: jax.Array) -> jax.Array:
    """See `api.gather_pages`."""
    return jnp.stack([pages[indices] for pages in pool])


def scatter_pages(
    pool: tuple[jax.Array, ...], staged: jax.Array, indices: jax.Array
) -> tuple[jax.Array, ...]:
    """See `api.scatter_pages`."""
    return tuple(
        pages.at[indices].set(new.astype(pages.dtype))
        for pages, new in zip(pool, staged, strict=True)
    )


def copy_pages(
    pool: tuple[jax.Array, ...], src: jax.Array, dst: jax.Array
) -> tuple[jax.Array, ...]:
    """See `api.copy_pages`."""
    return tuple(pages.at[dst].set(pages[src]) for pages in pool)


def page_checksums(staged: jax.Array) -> jax.Array:
    """See `api.page_checksums`."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[staged.dtype.itemsize]
    pages = jnp.moveaxis(staged, 1, 0).reshape(staged.shape[1], -1)
    words = jax.lax.bitcast_convert_type(pages, unsigned).astype(jnp.uint32)
    factors = 2 * jnp.arange(words.shape[1], dtype=jnp.uint32) + 1
    return jnp.sum(words * factors, axis=1, dtype=jnp.uint32)
