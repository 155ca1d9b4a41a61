"""The codec in plain XLA, for devices: the same bytes as elsewhere, in arrays of fixed size."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from pshare_jax.kernels.kv_codec.codebook import GROUP, Codebook


def encode(book: Codebook, pages: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Records of pages.

    Args:
        book: what their exponents are coded by; while this is traced its table may be traced, too.
        pages: `[n, L, 2, kv_heads, page_size, head_dim]` bfloat16.
        capacity: bytes of a record at most.

    Returns:
        `[n, capacity]` uint8 and `[n]` int32, bytes that each record needs. One that needs more
        than `capacity` is not whole.
    """
    count, shape = pages.shape[0], pages.shape[1:]
    fixed = book.fixed_bytes(math.prod(shape))
    bits = lax.bitcast_convert_type(pages, jnp.uint16).reshape(count, -1)
    low = (bits & 0x7F | bits >> 8 & 0x80).astype(jnp.uint8)
    exponents = (bits >> 7 & 0xFF).astype(jnp.uint8)
    if book.codec == "planes":
        codes = jnp.minimum(exponents - _bases(book, shape), jnp.uint8(7))
    else:
        table = jnp.asarray(book.table)
        codes = jnp.full(256, 15, jnp.uint8).at[table].min(jnp.arange(15, dtype=jnp.uint8))
        codes = codes[exponents]
    escaped = codes == 2**book.planes - 1
    planes = codes.reshape(count, -1, 1, GROUP // 8, 8)
    planes = planes >> jnp.arange(book.planes, dtype=jnp.uint8)[:, None, None] & 1
    planes = jnp.sum(planes << jnp.arange(8, dtype=jnp.uint8), axis=-1, dtype=jnp.uint8)
    place = jnp.where(escaped, _places(escaped), capacity)
    rows = jnp.arange(count)[:, None]
    rest = jnp.zeros((count, capacity - fixed), jnp.uint8)
    rest = rest.at[rows, place].set(exponents, mode="drop")
    record = jnp.concatenate([low, planes.reshape(count, -1), rest], axis=1)
    return record, fixed + jnp.sum(escaped, axis=1, dtype=jnp.int32)


def decode(book: Codebook, records: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The pages `[n, *shape]` bfloat16 of records that are whole, as `encode` gives them."""
    count, values = records.shape[0], math.prod(shape)
    fixed = book.fixed_bytes(values)
    planes = records[:, values:fixed].reshape(count, -1, book.planes, GROUP // 8, 1)
    bits = (planes >> jnp.arange(8, dtype=jnp.uint8) & 1).reshape(count, -1, book.planes, GROUP)
    bits = bits << jnp.arange(book.planes, dtype=jnp.uint8)[:, None]
    codes = jnp.sum(bits, axis=2, dtype=jnp.uint8).reshape(count, values)
    escaped = codes == 2**book.planes - 1
    if book.codec == "planes":
        exponents = codes + _bases(book, shape)
    else:
        exponents = jnp.append(jnp.asarray(book.table), jnp.uint8(0))[codes]
    place = _places(escaped)
    rest = jnp.pad(records[:, fixed:], ((0, 0), (0, 1)))
    following = jnp.take_along_axis(rest, jnp.clip(place, 0, rest.shape[1] - 1), axis=1)
    exponents = jnp.where(escaped, following, exponents).astype(jnp.uint16)
    low = records[:, :values].astype(jnp.uint16)
    joined = exponents << 7 | low & 0x7F | (low & 0x80) << 8
    return lax.bitcast_convert_type(joined, jnp.bfloat16).reshape(count, *shape)


def _bases(book: Codebook, shape: tuple[int, ...]) -> jax.Array:
    """Of all values of a page."""
    return jnp.broadcast_to(jnp.expand_dims(jnp.asarray(book.table), -2), shape).reshape(-1)


def _places(escaped: jax.Array) -> jax.Array:
    """How many of `[n, values]` are true before each: within its group, and in groups before it."""
    groups = escaped.reshape(escaped.shape[0], -1, GROUP)
    within = jnp.cumsum(groups, axis=2, dtype=jnp.int32)
    counts = within[:, :, -1:]
    before = jnp.cumsum(counts, axis=1) - counts
    return (within - groups + before).reshape(escaped.shape)
