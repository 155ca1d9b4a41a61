"""The codec in C++: `native/src/kv_codec.h`. Called with host memory, without JAX and the GIL."""

from __future__ import annotations

import numpy as np

from pshare_jax.kernels.kv_codec.codebook import Codebook
from pshare_jax.kernels.native.library import require_library


def encode(book: Codebook, staged: np.ndarray, index: int, out: np.ndarray) -> int | None:
    """Writes the record of one page of a staging array.

    Args:
        book: what its exponents are coded by.
        staged: `[L, n, 2, kv_heads, page_size, head_dim]` uint16, C-contiguous.
        index: of the page.
        out: uint8, C-contiguous.

    Returns:
        Bytes of the record, or None where `out` does not hold it.

    Raises:
        ConfigError: the C++ library cannot be had on this machine.
    """
    library = require_library()
    length = library.kv_encode(
        book.planes,
        staged[:, index].ctypes.data,
        *_geometry(staged),
        book.table.ctypes.data,
        out.ctypes.data,
        out.nbytes,
    )
    return None if length < 0 else length


def decode(book: Codebook, record: np.ndarray, staged: np.ndarray, index: int) -> None:
    """Writes the page of a record into a staging array; arguments and errors as of `encode`.

    Raises:
        ValueError: the record is not as long as its codes say.
    """
    library = require_library()
    whole = library.kv_decode(
        book.planes,
        record.ctypes.data,
        record.nbytes,
        *_geometry(staged),
        book.table.ctypes.data,
        staged[:, index].ctypes.data,
    )
    if not whole:
        raise ValueError(f"{record.nbytes} bytes are not what the record's codes say")


def _geometry(staged: np.ndarray) -> tuple[int, ...]:
    """Layers, values from a layer to the next, of a layer, of a block, and of a row of channels."""
    layers, count, *shape = staged.shape
    values = int(np.prod(shape))
    return layers, count * values, values, shape[-2] * shape[-1], shape[-1]
