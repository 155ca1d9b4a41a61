"""Activations times weights in C++: `native/src/matmul.h`.

Gradients are rounded to bfloat16 before they are multiplied, and are bfloat16, as their operands.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pshare_jax.kernels.native.library import require_library


def matmul(
    x: jax.Array, kernel: jax.Array, *, input_axes: int, transposed: bool, dtype: Any
) -> jax.Array:
    """See `api.matmul`; one device.

    Raises:
        ValueError: operands that are not bfloat16.
        ConfigError: the C++ library cannot be had on this machine.
    """
    if x.dtype != jnp.bfloat16 or kernel.dtype != jnp.bfloat16:
        raise ValueError(f"matmul: cpu_ffi multiplies bfloat16, not {x.dtype} by {kernel.dtype}")
    require_library()
    outer, inner = x.shape[: x.ndim - input_axes], math.prod(x.shape[x.ndim - input_axes :])
    out = kernel.shape[:1] if transposed else kernel.shape[input_axes:]
    columns = kernel if transposed else kernel.reshape(inner, math.prod(out))
    rows = x.reshape(math.prod(outer), inner)
    return _matmul(rows, columns, transposed, jnp.dtype(dtype).name).reshape(*outer, *out)


def _multiply(x: jax.Array, kernel: jax.Array, transposed: bool, dtype: str) -> jax.Array:
    """`[M, K]` times `[K, N]` (`[N, K]` if transposed) -> `[M, N]`."""
    return _product(x, kernel, turn_right=transposed, dtype=jnp.dtype(dtype))


def _forward(
    x: jax.Array, kernel: jax.Array, transposed: bool, dtype: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _multiply(x, kernel, transposed, dtype), (x, kernel)


def _backward(
    transposed: bool, dtype: str, operands: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del dtype
    x, kernel = operands
    g = gradient.astype(x.dtype)
    dx = _product(g, kernel, turn_right=not transposed, dtype=x.dtype)
    left, right = (g, x) if transposed else (x, g)
    return dx, _product(left, right, turn_left=True, dtype=kernel.dtype)


_matmul = jax.custom_vjp(_multiply, nondiff_argnums=(2, 3))
_matmul.defvjp(_forward, _backward)


def _product(
    left: jax.Array,
    right: jax.Array,
    *,
    turn_left: bool = False,
    turn_right: bool = False,
    dtype: jnp.dtype,
) -> jax.Array:
    """`left @ right`, either of them transposed before."""
    shape = (left.shape[1 if turn_left else 0], right.shape[0 if turn_right else 1])
    call = jax.ffi.ffi_call("pshare_matmul", jax.ShapeDtypeStruct(shape, dtype))
    return call(left, right, transpose_left=turn_left, transpose_right=turn_right)
