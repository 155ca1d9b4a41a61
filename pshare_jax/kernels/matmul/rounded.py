"""Activations rounded to 8 bits times weights of 8 bits, in XLA: what `native/src/int8.h` computes.

Inputs are rounded in groups of `GROUP`, each with a scale of its own. A group's sum is a whole
number below 2^24, which float32 holds: it is exact here too, in any order.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

GROUP = 32
"""Inputs that share a scale."""


def rounded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[..., K]` -> whole numbers `[..., groups, GROUP]` and their scales `[..., groups]`, float32.

    The last group is filled up with zeros. A group with something that is not finite has the scale
    NaN, and one of next to nothing is zero.
    """
    wide = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % GROUP)])
    wide = wide.reshape(*x.shape[:-1], -1, GROUP)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    finite = jnp.isfinite(largest)
    used = finite & (largest >= 1e-30)
    whole = jnp.where(used, jnp.round(wide * (127.0 / jnp.where(used, largest, 1.0))), 0.0)
    scale = jnp.where(used, largest / 127.0, jnp.where(finite, 0.0, jnp.nan))
    return whole, scale[..., 0]


def rounded_matmul(
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array,
    *,
    input_axes: int = 1,
    transposed: bool = False,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Rounds x and multiplies.

    Args:
        x: `[..., *in]`.
        kernel: `[*in, *out]` int8; `[out, in]` if `transposed`.
        scale: `[*out]` float32, of the kernel.
        input_axes: the number of `in` axes.
        transposed: of a kernel with two axes.
        dtype: of the result.

    Returns:
        `[..., *out]`.
    """
    outer, inner = x.shape[: x.ndim - input_axes], math.prod(x.shape[x.ndim - input_axes :])
    whole, scales = rounded(x.reshape(*outer, inner))
    columns = kernel.T if transposed else kernel.reshape(inner, -1)
    columns = jnp.pad(columns.astype(jnp.float32), [(0, -inner % GROUP), (0, 0)])
    columns = columns.reshape(-1, GROUP, columns.shape[1])
    sums = jnp.einsum("...gk,gkn->...gn", whole, columns)
    y = jnp.einsum("...gn,...g->...n", sums, scales) * scale.reshape(-1)
    return y.reshape(*outer, *scale.shape).astype(dtype)
