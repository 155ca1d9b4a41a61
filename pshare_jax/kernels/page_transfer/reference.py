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
