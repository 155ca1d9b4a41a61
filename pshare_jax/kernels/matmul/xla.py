"""Activations times weights in XLA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def matmul(
    x: jax.Array, kernel: jax.Array, *, input_axes: int, transposed: bool, dtype: Any
) -> jax.Array:
    """See `api.matmul`."""
    if kernel.dtype.itemsize == 1:
        # On accelerators the product reads 8 bits, and converts them on the way.
        kernel = kernel.astype(x.dtype)
    if x.dtype == kernel.dtype == jnp.bfloat16:
        return _matmul(x, kernel, input_axes, transposed).astype(dtype)
    return _product(x, kernel, input_axes, transposed).astype(dtype)


def _product(x: jax.Array, kernel: jax.Array, input_axes: int, transposed: bool) -> jax.Array:
    """Float32."""
    if transposed:
        return jnp.einsum("...e,ve->...v", x, kernel, preferred_element_type=jnp.float32)
    return jnp.tensordot(x, kernel, axes=input_axes, preferred_element_type=jnp.float32)


def _forward(
    x: jax.Array, kernel: jax.Array, input_axes: int, transposed: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, kernel, input_axes, transposed), (x, kernel)


def _backward(
    input_axes: int, transposed: bool, operands: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradient is rounded to bfloat16 before it is multiplied, sums are float32.

    So do other trainers in mixed precision. JAX's own rule would multiply the float32 gradient of
    the float32 result by bfloat16: a product in float32, which no matrix unit is made for.
    """
    x, kernel = operands
    g = gradient.astype(x.dtype)
    outer = tuple(range(x.ndim - (1 if transposed else input_axes)))
    if transposed:
        dx, dw = _sums(g, kernel, ((g.ndim - 1,), (0,))), _sums(g, x, (outer, outer))
    else:
        out = tuple(range(len(outer), g.ndim)), tuple(range(input_axes, kernel.ndim))
        dx, dw = _sums(g, kernel, out), _sums(x, g, (outer, outer))
    return dx.astype(x.dtype), dw.astype(kernel.dtype)


def _sums(left: jax.Array, right: jax.Array, axes: Any) -> jax.Array:
    return jnp.tensordot(left, right, axes=axes, preferred_element_type=jnp.float32)


_matmul = jax.custom_vjp(_product, nondiff_argnums=(2, 3))
_matmul.defvjp(_forward, _backward)
