"""Tensors that are read when asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import ml_dtypes
import numpy as np

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
"""The dtypes of a checkpoint, by name."""

INT8 = np.dtype(np.int8)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
NARROW = (INT8, FP8)
"""Of weights of 8 bits, which have a scale for each output."""

STORED_DTYPES = {**DTYPES, **{dtype.name: dtype for dtype in NARROW}}
"""The dtypes of a checkpoint's tensors, by name."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose shape and dtype are known and whose values are read on each call of `read`.

    Conversions hand these on, so that one tensor at a time is in memory.

    Args:
        shape: element counts.
        dtype: numpy dtype.
        read: gives the values as an array of that shape and dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def astype(self, dtype: np.dtype) -> LazyTensor:
        """The same tensor, rounded to `dtype` when it is read."""
        if dtype == self.dtype:
            return self
        return LazyTensor(self.shape, dtype, lambda: self.read().astype(dtype))


def as_lazy(tensor: LazyTensor | np.ndarray | jax.Array) -> LazyTensor:
    """`tensor` as a LazyTensor; device arrays are copied to the host when read."""
    if isinstance(tensor, LazyTensor):
        return tensor
    return LazyTensor(tuple(tensor.shape), np.dtype(tensor.dtype), lambda: np.asarray(tensor))


def total_bytes(tensors: Mapping[str, Any]) -> int:
    """Size in bytes of all `tensors` (LazyTensor or array)."""
    return sum(tensor.nbytes for tensor in tensors.values())


def common_dtype(tensors: Mapping[str, LazyTensor]) -> str:
    """The dtype of a model of `tensors`: bfloat16 when all its matrices are, else float32."""
    matrices = {tensor.dtype.name for tensor in tensors.values() if len(tensor.shape) > 1}
    return "bfloat16" if matrices == {"bfloat16"} else "float32"


def changed_by(dtype: str, tensors: Mapping[str, LazyTensor]) -> list[str]:
    """Names of the vectors (norms, biases) that rounding to `dtype` changes; reads them."""
    target = DTYPES[dtype]
    vectors = {n: t for n, t in tensors.items() if len(t.shape) == 1 and t.dtype != target}
    return [
        name
        for name, tensor in vectors.items()
        if not np.array_equal((values := tensor.read()), values.astype(target).astype(values.dtype))
    ]
