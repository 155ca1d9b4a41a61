"""The memory in which pages of 8 bits are widened is given back, to the byte."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from pshare_jax.kernels.kv_dtype import FP8
from pshare_jax.kernels.native.library import require_library, widened_bytes
from pshare_jax.kernels.paged_attention.api import paged_attention

CALLS = 1 << 14
"""`kCalls` of small_pages.h: what no call has needed half of for so many calls is given back."""

COUNT, SLOTS, DIM = 64, 16, 16
PAGE_BYTES = 4 * 2 * SLOTS * DIM
"""Of a page with one head, widened to float32."""


@pytest.fixture(autouse=True)
def alone(optimised: None) -> Iterator[None]:
    """One thread works on a call, in a loop that XLA optimises: thousands take no time."""
    library = require_library()
    library.limit_threads(1)
    yield
    library.limit_threads(library.threads)


@functools.cache
def operands() -> tuple[jax.Array, jax.Array, jax.Array]:
    """A query, pages, and a row of their numbers."""
    pages = jnp.zeros((COUNT + 1, 2, 1, SLOTS, DIM), FP8)
    return jnp.ones((1, 1, 1, DIM)), pages, jnp.arange(1, COUNT + 1, dtype=jnp.int32)[None]


@jax.jit
def _calls(tokens: jax.Array, times: jax.Array) -> jax.Array:
    query, pages, table = operands()
    rows = table, jnp.maximum(tokens - 1, 0), jnp.minimum(tokens, 1)

    def call(_: jax.Array, query: jax.Array) -> jax.Array:
        return paged_attention(query, pages, *rows, backend="cpu_ffi")

    return lax.fori_loop(0, times, call, query)


def widen(num_pages: int, times: int = 1) -> None:
    """So many calls, each of which reads so many pages."""
    tokens = jnp.full(1, num_pages * SLOTS, jnp.int32)
    jax.block_until_ready(_calls(tokens, jnp.asarray(times)))


def block(num_pages: int) -> int:
    """Bytes that are taken where there are too few: a quarter more, in lines of the cache."""
    size = num_pages * PAGE_BYTES
    return -(-(size + size // 4 + 1) // 64) * 64


@pytest.fixture
def nothing() -> None:
    """Whatever other tests have needed is given back."""
    widen(0, CALLS + 1)
    assert widened_bytes() == block(0) == 64


@pytest.mark.usefixtures("nothing")
def test_what_no_call_has_needed_half_of_for_a_while_is_given_back() -> None:
    for pages in (3, 1, 20, COUNT):
        widen(pages)
    assert widened_bytes() == block(COUNT) == 163904, "what was too small is given back"
    half = -(-block(COUNT) // (2 * PAGE_BYTES))
    widen(1, CALLS - 1)
    widen(half)
    widen(1, CALLS)
    assert widened_bytes() == 163904, "the while began anew, and is not over"
    widen(1)
    assert widened_bytes() == block(1) == 2624
