"""Storing K and V by definition: one token after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
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
    B, T = k.shape[:2]
    page_size = pages.shape[3]
    kv = jnp.stack([k, v], axis=2).astype(pages.dtype)

    def store(i: jax.Array, pages: jax.Array) -> jax.Array:
        row, token = i // T, i % T
        position = q_start[row] + token
        page, slot = page_table[row, position // page_size], position % page_size
        written = pages.at[page, :, :, slot].set(kv[row, token])
        return jnp.where(token < q_lens[row], written, pages)

    return lax.fori_loop(0, B * T, store, pages)
