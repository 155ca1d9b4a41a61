"""Rounded activations times weights of 8 bits, in XLA: what `native/src/int8.h` computes.

Inputs are rounded in groups, each with a scale of its own, to whole numbers of one byte
or two. Each byte's sum over a group is a whole number below 2^24, which float32 holds: it is exact
here too, in any order.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

GROUP = {1: 32, 2: 128}
"""Inputs that share a scale, by the bytes of a rounded number."""

BYTES = {"lm_head": 2}
"""Of rounded activations, by the name of the projection; one for the others. As in
`native/src/layer.h` and `head.h`."""


def rounded(x: jax.Array, bytes: int = 1) -> tuple[jax.Array, jax.Array]:
    """`[..., K]` -> whole numbers `[..., bytes, groups, n]`, scales `[..., bytes, groups]`.

    Both are float32. Of two bytes the upper one comes first; each is a number from -128 to 127. The
    last group is filled up with zeros. A group with something that is not finite has the scale NaN,
    and one of next to nothing is zero.
    """
    group = GROUP[bytes]
    wide = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % group)])
    wide = wide.reshape(*x.shape[:-1], -1, group)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    finite = jnp.isfinite(largest)
    used = finite & (largest >= 1e-30)
    most = 127.0 if bytes == 1 else 127.0 * 256
    whole = jnp.where(used, jnp.round(wide * (most / jnp.where(used, largest, 1.0))), 0.0)
    scale = jnp.where(used, largest / most, jnp.where(finite, 0.0, jnp.nan))[..., 0]
    if bytes == 1:
        return whole[..., None, :, :], scale[..., None, :]
    upper = jnp.floor((whole + 128) / 256)
    halves = jnp.stack([upper, whole - 256 * upper], axis=-3)
    return halves, jnp.stack([256 * scale, scale], axis=-2)


def rounded_matmul(
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array,
    *,
    input_axes: int = 1,
    transposed: bool = False,
    bytes: int = 1,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Rounds x and multiplies.

    Args:
        x: `[..., *in]`.
        kernel: `[*in, *out]` int8; `[out, in]` if `transposed`.
        scale: `[*out]` float32, of the kernel.
        input_axes: the number of `in` axes.
        transposed: of a kernel with two axes.
        bytes: of a rounded number of x.
        dtype: of the result.

    Returns:
        `[..., *out]`.
    """
    outer, inner = x.shape[: x.ndim - input_axes], math.prod(x.shape[x.ndim - input_axes :])
    whole, scales = rounded(x.reshape(*outer, inner), bytes)
    columns = kernel.T if transposed else kernel.reshape(inner, -1)
    columns = jnp.pad(columns.astype(jnp.float32), [(0, -inner % GROUP[bytes]), (0, 0)])
    columns = columns.reshape(-1, GROUP[bytes], columns.shape[1])
    sums = jnp.einsum("...bgk,gkn->...bgn", whole, columns)
    y = jnp.einsum("...bgn,...bg->...n", sums, scales) * scale.reshape(-1)
    return y.reshape(*outer, *scale.shape).astype(dtype)
