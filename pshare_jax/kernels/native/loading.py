"""Weights on their way from files into panels, in C++ and without Python's lock.

While others are served this runs in a thread of a lower priority, which holds no lock that they
want: it takes what they leave of a core.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pshare_jax.kernels.native.library import Library

BESIDE_OTHERS = 10
"""Steps of a lower priority (see nice(2)) for work beside threads that serve: about a tenth of what
one of them gets where there are too few cores for all, so that it does not starve either."""

ARRAY_ALIGNMENT = 64
"""Bytes from which on JAX takes an array of the host as it is."""

_INT8_ZERO = 0x80808080
"""A unit of int8 zeros, which are written plus 128; of all else zero is zero."""

_GIVE_WAY_SECONDS = 0.001


def give_way() -> None:
    """Lets threads that serve have Python's lock and a core; between pieces of work in Python."""
    time.sleep(_GIVE_WAY_SECONDS)


def aligned(shape: Sequence[int], dtype: Any, alignment: int = ARRAY_ALIGNMENT) -> np.ndarray:
    """A C-contiguous array of any content, whose memory begins at a multiple of `alignment`."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].view(dtype).reshape(shape)


def packed_dtype(dtype: Any) -> np.dtype:
    """The dtype of what `pack_into` makes of matrices of `dtype`: uint8 of int8."""
    return np.dtype(np.uint8) if dtype == np.int8 else np.dtype(dtype)


def packed_size(library: Library, matrices: Sequence[np.ndarray]) -> int:
    """Numbers that `pack_into` writes for matrices `[K, N_i]` of one K."""
    columns = library.panel_columns
    k, unit = matrices[0].shape[0], _unit(matrices[0].dtype)
    panels = sum(-(-matrix.shape[1] // columns) for matrix in matrices)
    return panels * columns * -(-k // unit) * unit


def pack_into(
    library: Library,
    matrices: Sequence[np.ndarray],
    out: np.ndarray,
    *,
    interleave: bool = False,
    nice: int = 0,
) -> None:
    """Writes matrices `[K, N_i]` side by side as panels `[panels, K / unit, columns, unit]`.

    A unit is four rows of 8 bits, two of bfloat16 or one of float32. Each matrix begins with a
    panel of its own and is padded with zeros to whole panels. Numbers of int8 are written plus 128.

    Args:
        library: has the number of a panel's columns.
        matrices: float32, bfloat16, int8 or float8_e4m3fn, of one dtype and one K, with any
            strides.
        out: `[packed_size]` of `packed_dtype` of that dtype; contiguous.
        interleave: let the panels of the matrices, which are of one shape, alternate.
        nice: steps by which the thread that does it has a lower priority.
    """
    if out.shape != (packed_size(library, matrices),) or not out.flags.c_contiguous:
        raise ValueError(f"{packed_size(library, matrices)} numbers do not fit {out.shape}")
    if interleave and len({matrix.shape for matrix in matrices}) > 1:
        raise ValueError("panels alternate of matrices of one shape only")
    step = len(matrices) if interleave else 1
    at = 0
    for matrix in matrices:
        size = packed_size(library, [matrix])
        steps = [stride // matrix.itemsize for stride in matrix.strides]
        library.pack(
            matrix.ctypes.data,
            *matrix.shape,
            *steps,
            matrix.itemsize,
            step,
            out[at:].ctypes.data,
            _INT8_ZERO if matrix.dtype == np.int8 else 0,
            nice,
        )
        at += size // _panel_count(library, matrix) if interleave else size


def read_tensor(
    library: Library,
    path: Path,
    layout: tuple[int, int, int],
    stored: Any,
    out: np.ndarray,
    nice: int = 0,
) -> bool:
    """Reads a tensor's file as `convert.zarr` writes it, and checks all of its checksums.

    Args:
        library: the C++ library.
        path: of the file.
        layout: rows, chunks and run: each chunk has the rows times the run of its numbers.
        stored: dtype in the file, float32 or bfloat16, or one of 8 bits.
        out: takes its numbers, as float32 or bfloat16, or 8 bits as they are; C-contiguous, of the
            tensor's shape.
        nice: steps by which the thread that does it has a lower priority.

    Returns:
        Whether the file was exactly that; otherwise `out` has anything.
    """
    size = np.dtype(stored).itemsize
    return bool(
        library.read_tensor(bytes(path), *layout, size, out.ctypes.data, out.dtype.itemsize, nice)
    )


def _unit(dtype: Any) -> int:
    return 4 // np.dtype(dtype).itemsize


def _panel_count(library: Library, matrix: np.ndarray) -> int:
    return -(-matrix.shape[1] // library.panel_columns)
