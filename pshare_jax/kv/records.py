"""Coded pages as arrays, which `jax.experimental.transfer` moves: a row of fixed length a page.

What is in the host's memory anyway, on CPUs, is coded there, in C++. On accelerators the device
codes, by programs that are compiled beforehand for any codebook of one codec; so it has to be
asked for by name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from pshare_jax.core.buckets import TRANSFER_BUCKETS
from pshare_jax.kernels.kv_codec import xla
from pshare_jax.kernels.kv_codec.api import PageCodec, page_codec
from pshare_jax.kernels.kv_codec.codebook import GROUP, Codebook
from pshare_jax.kv.coding import table_shape

_BFLOAT16 = np.dtype(jax.numpy.bfloat16)

ESCAPES = 0.04
"""Share of values whose exponents have no code for which a row has room."""


def row_bytes(codec: str, shape: Sequence[int]) -> int:
    """Of a coded page `[L, 2, kv_heads, page_size, head_dim]`."""
    values = math.prod(shape)
    planes = Codebook(codec, np.empty(0, np.uint8)).fixed_bytes(values)
    return planes + math.ceil(ESCAPES * values / GROUP) * GROUP


class Records:
    """Codes pieces of transfers.

    Args:
        shape: of a page, `[L, 2, kv_heads, page_size, head_dim]`.
        staging: where pieces lie; one device.
        codec: that devices are to code by; empty codes in the host's memory.
    """

    def __init__(self, shape: Sequence[int], staging: Sharding, codec: str = ""):
        self._shape = tuple(shape)
        self._staging = staging
        self._codec = codec
        (device,) = staging.device_set
        self._rows = SingleDeviceSharding(device)
        if codec:
            length = row_bytes(codec, shape)
            encode = functools.partial(_encode, codec, length)
            self._encode = jax.jit(encode, out_shardings=self._rows)
            decode = functools.partial(_decode, codec, self._shape)
            self._decode = jax.jit(decode, out_shardings=staging)

    def warm_up(self, *, sends: bool, receives: bool) -> None:
        """Compiles what the device runs."""
        if not self._codec:
            return
        book = Codebook(self._codec, np.zeros(table_shape(self._codec, self._shape), np.uint8))
        for bucket in TRANSFER_BUCKETS:
            if sends:
                zeros = np.zeros((self._shape[0], bucket, *self._shape[1:]), _BFLOAT16)
                self.encode(PageCodec(book, ""), jax.device_put(zeros, self._staging), bucket)
            if receives:
                rows = np.zeros((bucket, row_bytes(self._codec, self._shape)), np.uint8)
                self.decode(book, jax.device_put(rows, self._rows), [rows.shape[1]] * bucket)

    def spec(self, codec: str, bucket: int) -> jax.ShapeDtypeStruct:
        """What a coded piece comes as: `[bucket, bytes of a row]` uint8."""
        size = (bucket, row_bytes(codec, self._shape))
        return jax.ShapeDtypeStruct(size, np.uint8, sharding=self._rows)

    def encode(
        self, codec: PageCodec, piece: jax.Array, count: int
    ) -> tuple[jax.Array, list[int]] | None:
        """Codes a piece.

        Args:
            codec: with its codebook.
            piece: `[L, bucket, 2, kv_heads, page_size, head_dim]`.
            count: of its pages; others are padding.

        Returns:
            `[bucket, bytes of a row]` uint8, and the bytes of each record; None where one does not
            fit.
        """
        book = codec.book
        assert book is not None
        size = row_bytes(book.codec, self._shape)
        if self._codec:
            rows, needed = self._encode(book.table, piece)
            lengths = [int(length) for length in np.asarray(needed)[:count]]
            return (rows, lengths) if max(lengths) <= size else None
        staged, out = np.asarray(piece), np.zeros((piece.shape[1], size), np.uint8)
        lengths = []
        for index in range(count):
            length = codec.encode(staged, index, out[index])
            if length is None:
                return None
            lengths.append(length)
        return jax.device_put(out, self._rows), lengths

    def decode(self, book: Codebook, rows: jax.Array, lengths: Sequence[int]) -> jax.Array:
        """The piece that `encode` was given, but for its padding.

        Raises:
            ValueError: a record is not that of a page.
        """
        size = rows.shape[1]
        wrong = [length for length in lengths if not 0 < length <= size]
        if wrong or len(lengths) > len(rows):
            raise ValueError(f"{len(lengths)} records of {list(lengths)} bytes")
        if self._codec:
            return self._decode(book.table, rows)
        codec, records = page_codec(book), np.asarray(rows)
        piece = np.zeros((self._shape[0], len(rows), *self._shape[1:]), np.uint16)
        for index, length in enumerate(lengths):
            codec.decode(records[index, :length], piece, index)
        return jax.device_put(piece.view(_BFLOAT16), self._staging)


def _encode(
    codec: str, length: int, table: jax.Array, piece: jax.Array
) -> tuple[jax.Array, jax.Array]:
    pages = jax.numpy.moveaxis(piece, 1, 0)
    return xla.encode(Codebook(codec, table), pages, length)  # type: ignore[arg-type]


def _decode(codec: str, shape: tuple[int, ...], table: jax.Array, rows: jax.Array) -> jax.Array:
    pages = xla.decode(Codebook(codec, table), rows, shape)  # type: ignore[arg-type]
    return jax.numpy.moveaxis(pages, 0, 1)
