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
    _check(x, kernel)
    inner = math.prod(x.shape[x.ndim - input_axes :])
    outer, out = x.shape[: x.ndim - input_axes], kernel.shape[input_axes:]
    if transposed:
        out, columns = kernel.shape[:1], kernel
    else:
        columns = kernel.reshape(inner, math.prod(out))
    rows = x.reshape(math.prod(outer), inner)
    return _matmul(rows, columns, transposed, jnp.dtype(dtype).name).reshape(*outer, *out)


def lora_matmul(
    x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array, *, input_axes: int, dtype: Any
) -> jax.Array:
    """See `api.lora_matmul`; one device.

    Raises:
        ValueError: operands that are not bfloat16.
        ConfigError: the C++ library cannot be had on this machine.
    """
    for operand in (kernel, a, b):
        _check(x, operand)
    inner = math.prod(x.shape[x.ndim - input_axes :])
    outer, out = x.shape[: x.ndim - input_axes], kernel.shape[input_axes:]
    rows, columns = x.reshape(math.prod(outer), inner), kernel.reshape(inner, math.prod(out))
    a, b = a.reshape(inner, a.shape[-1]), b.reshape(b.shape[0], math.prod(out))
    return _lora_matmul(rows, columns, a, b, jnp.dtype(dtype).name).reshape(*outer, *out)


def _check(x: jax.Array, kernel: jax.Array) -> None:
    if x.dtype != jnp.bfloat16 or kernel.dtype != jnp.bfloat16:
        raise ValueError(f"matmul: cpu_ffi multiplies bfloat16, not {x.dtype} by {kernel.dtype}")
    require_library()


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


def _lora_multiply(
    x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array, dtype: str
) -> jax.Array:
    """`[M, K]` times `[K, N]` plus `[K, r]` times `[r, N]` -> `[M, N]`."""
    return _lora_forward(x, kernel, a, b, dtype)[0]


def _lora_forward(
    x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array, dtype: str
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    low = _product(x, a, dtype=x.dtype)
    y = _product(x, kernel, low, b, dtype=jnp.dtype(dtype))
    return y, (x, kernel, a, b, low)


def _lora_backward(
    dtype: str, operands: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, ...]:
    del dtype
    x, kernel, a, b, low = operands
    g = gradient.astype(x.dtype)
    dlow = _product(g, b, turn_right=True, dtype=x.dtype)
    dx = _product(g, kernel, dlow, a, turn_right=True, dtype=x.dtype)
    dkernel = _product(x, g, turn_left=True, dtype=kernel.dtype)
    # The few columns on the right: what is there is packed, which takes longer than reading.
    da = _product(x, dlow, turn_left=True, dtype=a.dtype)
    db = _product(g, low, turn_left=True, dtype=b.dtype).T
    return dx, dkernel, da, db


_lora_matmul = jax.custom_vjp(_lora_multiply, nondiff_argnums=(4,))
_lora_matmul.defvjp(_lora_forward, _lora_backward)


def _product(
    left: jax.Array,
    right: jax.Array,
    *more: jax.Array,
    turn_left: bool = False,
    turn_right: bool = False,
    dtype: jnp.dtype,
) -> jax.Array:
    """`left @ right`, either of them transposed before, plus the product of two more alike."""
    shape = (left.shape[1 if turn_left else 0], right.shape[0 if turn_right else 1])
    call = jax.ffi.ffi_call("pshare_matmul", jax.ShapeDtypeStruct(shape, dtype))
    return call(left, right, *more, transpose_left=turn_left, transpose_right=turn_right)
