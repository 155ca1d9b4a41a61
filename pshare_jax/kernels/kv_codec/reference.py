"""The codec by definition, in numpy."""

from __future__ import annotations

import numpy as np

from pshare_jax.kernels.kv_codec.codebook import GROUP, Codebook


def encode(book: Codebook, page: np.ndarray) -> np.ndarray:
    """The record of one page.

    Args:
        book: what its exponents are coded by.
        page: `[L, 2, kv_heads, page_size, head_dim]` uint16.

    Returns:
        uint8: signs and mantissas, one byte a value; planes of codes; exponents without a code.
    """
    exponents = (page >> 7 & 0xFF).astype(np.uint8)
    low = (page & 0x7F | page >> 8 & 0x80).astype(np.uint8)
    if book.codec == "planes":
        distance = exponents - book.bases(page.shape)
        codes = np.minimum(distance, np.uint8(7)).reshape(-1)
    else:
        codes = book.code_of()[exponents].reshape(-1)
    escaped = exponents.reshape(-1)[codes == 2**book.planes - 1]
    bits = codes.reshape(-1, 1, GROUP) >> np.arange(book.planes, dtype=np.uint8)[:, None] & 1
    planes = np.packbits(bits, axis=-1, bitorder="little")
    return np.concatenate([low.reshape(-1), planes.reshape(-1), escaped])


def decode(book: Codebook, record: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The page of a record: uint16 of `shape`.

    Raises:
        ValueError: the record is not as long as its codes say.
    """
    values = int(np.prod(shape))
    fixed = book.fixed_bytes(values)
    if len(record) < fixed:
        raise ValueError(f"the record has {len(record)} bytes, codes alone take {fixed}")
    planes = record[values:fixed].reshape(-1, book.planes, GROUP // 8)
    bits = np.unpackbits(planes, axis=-1, bitorder="little")
    weights = np.left_shift(1, np.arange(book.planes, dtype=np.uint8), dtype=np.uint8)
    codes = np.sum(bits * weights[:, None], axis=1, dtype=np.uint8).reshape(-1)
    escaped = codes == 2**book.planes - 1
    if np.count_nonzero(escaped) != len(record) - fixed:
        raise ValueError(
            f"{np.count_nonzero(escaped)} exponents have no code, but {len(record) - fixed} follow"
        )
    if book.codec == "planes":
        exponents = (codes + book.bases(shape).reshape(-1)).astype(np.uint8)
    else:
        exponents = np.append(book.table, np.uint8(0))[codes]
    exponents[escaped] = record[fixed:]
    low = record[:values].astype(np.uint16)
    joined = exponents.astype(np.uint16) << 7 | low & 0x7F | (low & 0x80) << 8
    return joined.reshape(shape)
