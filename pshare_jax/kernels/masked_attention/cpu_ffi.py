"""Attention under a mask and its gradient in C++: `native/src/masked_attention.h`.

Scores are neither kept for the gradient nor written to memory as a whole. Weights and their
gradients are rounded to bfloat16 before they are multiplied; sums are float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pshare_jax.kernels.native.library import require_library


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def masked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, constant_keys: int = 0
) -> jax.Array:
    """Scaled dot-product attention with grouped KV heads, differentiable in reverse mode.

    Args:
        q: `[B, T, heads, head_dim]` bfloat16; query head h reads KV head h // (heads // kv_heads).
        k: `[B, S, kv_heads, head_dim]` bfloat16.
        v: like k.
        mask: `[B, T, S]` bool, True where a query may look. A query that sees nothing gives zeros.
        constant_keys: that many of the first keys and values are constants: their gradient is zero.

    Returns:
        `[B, T, heads, head_dim]` bfloat16.

    Raises:
        ValueError: operands that are not bfloat16.
        ConfigError: the C++ library cannot be had on this machine.
    """
    return _forward(q, k, v, mask, constant_keys)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, constant_keys: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    if any(x.dtype != jnp.bfloat16 for x in (q, k, v)):
        raise ValueError(f"masked_attention: bfloat16 only, not {q.dtype}, {k.dtype}, {v.dtype}")
    require_library()
    call = jax.ffi.ffi_call("pshare_masked_attention", jax.ShapeDtypeStruct(q.shape, q.dtype))
    return call(q, k, v, mask, constant_keys=np.int64(constant_keys)), (q, k, v, mask)


def _backward(
    constant_keys: int, operands: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[:3]]
    call = jax.ffi.ffi_call("pshare_masked_attention_gradient", results)
    of_q, of_k, of_v = call(*operands, gradient, constant_keys=np.int64(constant_keys))
    return of_q, of_k, of_v, None


masked_attention.defvjp(_forward, _backward)
