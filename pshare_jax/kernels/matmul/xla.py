"""Activations times weights in XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, kernel: jax.Array, *, input_axes: int, transposed: bool) -> jax.Array:
    """See `api.matmul`."""
    if transposed:
        return jnp.einsum("...e,ve->...v", x, kernel, preferred_element_type=jnp.float32)
    return jnp.tensordot(x, kernel, axes=input_axes, preferred_element_type=jnp.float32)
