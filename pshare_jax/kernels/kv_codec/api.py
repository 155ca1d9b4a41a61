"""Lossless compression of bfloat16 KV pages.

Exponents of KV have less than 3 bits of entropy; signs and mantissas cannot be compressed. The
record of a page, in the order of its values (layer, K or V, head, token, channel):

1. one byte a value, sign above mantissa;
2. 64 values after another: a little-endian 64-bit word for each bit of their codes, lowest first;
3. one byte for each value whose code is the last one: its exponent, in order.

`planes` has codes of 3 bits, the distance to a base exponent of the value's channel; `top16` has
codes of 4 bits, the place in a table of exponents, as SplitZip has. All backends read and write
the same bytes.
`raw` is the page as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pshare_jax.kernels.backends import CPU_FFI
from pshare_jax.kernels.kv_codec import cpu_ffi, reference
from pshare_jax.kernels.kv_codec.codebook import Codebook
from pshare_jax.kernels.native.library import load_library


@dataclass(frozen=True)
class PageCodec:
    """Codes pages in host memory.

    Args:
        book: what exponents are coded by; None is `raw`.
        backend: `cpu_ffi`, or `reference`, which is slow.
    """

    book: Codebook | None
    backend: str

    @property
    def name(self) -> str:
        """The codec's name."""
        return "raw" if self.book is None else self.book.codec

    def encode(self, staged: np.ndarray, index: int, out: np.ndarray) -> int | None:
        """Writes the record of one page of a staging array.

        Args:
            staged: `[L, n, 2, kv_heads, page_size, head_dim]`, C-contiguous, of 2 bytes a value
                unless the codec is `raw`.
            index: of the page.
            out: uint8, C-contiguous.

        Returns:
            Bytes of the record, or None where `out` does not hold it.
        """
        if self.book is None:
            page = staged[:, index]
            if page.nbytes > out.nbytes:
                return None
            out[: page.nbytes].reshape(page.shape[0], -1)[:] = _bytes(page)
            return page.nbytes
        bits = staged.view(np.uint16)
        if self.backend == CPU_FFI:
            return cpu_ffi.encode(self.book, bits, index, out)
        record = reference.encode(self.book, bits[:, index])
        if len(record) > out.nbytes:
            return None
        out[: len(record)] = record
        return len(record)

    def decode(self, record: np.ndarray, staged: np.ndarray, index: int) -> None:
        """Writes the page of a record (uint8) into a staging array, as `encode` takes it.

        Raises:
            ValueError: the record is not that of such a page.
        """
        if self.book is None:
            page = staged[:, index]
            if record.nbytes != page.nbytes:
                raise ValueError(f"a page has {page.nbytes} bytes, the record {record.nbytes}")
            page[:] = record.view(staged.dtype).reshape(page.shape)
            return
        bits = staged.view(np.uint16)
        if self.backend == CPU_FFI:
            cpu_ffi.decode(self.book, record, bits, index)
        else:
            bits[:, index] = reference.decode(self.book, record, bits[:, index].shape)


def page_codec(book: Codebook | None) -> PageCodec:
    """A codec by the fastest backend that this machine has."""
    return PageCodec(book, CPU_FFI if load_library() is not None else "reference")


def _bytes(page: np.ndarray) -> np.ndarray:
    """`[L, bytes of a layer]` uint8 of a page whose layers are contiguous."""
    return page.reshape(page.shape[0], -1).view(np.uint8)
