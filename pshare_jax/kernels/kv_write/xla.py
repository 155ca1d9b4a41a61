"""Storing K and V in plain XLA: one scatter of tokens, which XLA does in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh


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
    """See `api.kv_write`."""
    del mesh  # XLA splits the work as its operands lie.
    page_size = pages.shape[3]
    token = jnp.arange(k.shape[1], dtype=jnp.int32)
    position = q_start[:, None] + token
    page = jnp.take_along_axis(page_table, position // page_size, axis=1, mode="clip")
    page = jnp.where(token < q_lens[:, None], page, 0)
    slot = position % page_size
    # K and V one after the other: stacking them first would copy both.
    pages = pages.at[page, 0, :, slot].set(k.astype(pages.dtype))
    return pages.at[page, 1, :, slot].set(v.astype(pages.dtype))
