"""Activations times weights in XLA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def matmul(
    x: jax.Array, kernel: jax.Array, *, input_axes: int, transposed: bool, dtype: Any
) -> jax.Array:
    """See `api.matmul`."""
    if jnp.issubdtype(kernel.dtype, jnp.integer):
        # On accelerators the product reads whole numbers, and converts them on the way.
        kernel = kernel.astype(x.dtype)
    if transposed:
        y = jnp.einsum("...e,ve->...v", x, kernel, preferred_element_type=jnp.float32)
    else:
        y = jnp.tensordot(x, kernel, axes=input_axes, preferred_element_type=jnp.float32)
    return y.astype(dtype)
