"""Dtypes of KV pages: what is computed in, or 8 bits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

FP8 = jnp.dtype(jnp.float8_e4m3fn)
"""One bit of sign, four of exponent, three of mantissa; no infinities."""

LARGEST = float(jnp.finfo(FP8).max)
"""448; keys and values are a hundredth of that in most models."""


def as_kv(x: jax.Array, dtype: Any) -> jax.Array:
    """Keys or values rounded to the dtype of pages; in 8 bits larger ones become the largest."""
    if jnp.dtype(dtype) == FP8:
        # A cast would make NaN of them; of NaN it stays.
        x = jnp.clip(x, -LARGEST, LARGEST)
    return x.astype(dtype)
