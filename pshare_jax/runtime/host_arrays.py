"""Small numpy arrays that travel to the device as arguments of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np


def host_array(values: Any, dtype: type) -> jax.Array:
    """A numpy array, typed as what the traced step sees: jit moves it to the step's mesh."""
    return cast(jax.Array, np.asarray(values, dtype))


def padded(rows: Sequence[Sequence[int]], shape: tuple[int, int]) -> jax.Array:
    """int32 array of `shape` with `rows` at its left and top, 0 elsewhere."""
    array = np.zeros(shape, np.int32)
    for i, row in enumerate(rows):
        array[i, : len(row)] = row
    return cast(jax.Array, array)
