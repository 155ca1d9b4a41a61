"""Donated pools are updated in place: nothing of a pool's size is allocated."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from pshare_jax.kernels.kv_write.api import kv_write
from pshare_jax.kernels.page_transfer.api import copy_pages, gather_pages, scatter_pages
from pshare_jax.kernels.paged_attention.api import paged_attention
from tests.pairwise import some

pytestmark = pytest.mark.usefixtures("optimised")

LAYERS, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_PAGES = 2, 4, 2, 16, 16, 4000
POOL = tuple(
    jax.ShapeDtypeStruct((NUM_PAGES, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM), jnp.float32)
    for _ in range(LAYERS)
)
POOL_BYTES = sum(4 * pages.size for pages in POOL)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def layers(pool, x, table, start, lens):
    """The cache traffic of a two-layer decoder: x is queries, keys and values at once."""
    pool = list(pool)
    for i, pages in enumerate(pool):
        kv = x[:, :, :KV_HEADS]
        pool[i] = kv_write(pages, kv, kv, table, start, lens)
        x = x + paged_attention(x, pool[i], table, start, lens)
    return tuple(pool), x


def several_steps(pool, x, table, start, lens, count):
    def step(i, carry):
        return layers(*carry, table, start + i, lens)

    return lax.fori_loop(0, count, step, (pool, x))


def assert_in_place(function, *arguments):
    compiled = jax.jit(function, donate_argnums=0).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= POOL_BYTES
    assert memory.temp_size_in_bytes < POOL_BYTES / 50


SHAPES = {"decode": (8, 1), "prefill": (1, 64)}


@pytest.mark.parametrize(
    ("steps", "shape"),
    some(
        itertools.product(["one step", "a loop of steps"], SHAPES),
        [("one step", "prefill"), ("a loop of steps", "decode")],
    ),
)
def test_steps_are_in_place(steps, shape):
    batch, tokens = SHAPES[shape]
    x = jax.ShapeDtypeStruct((batch, tokens, HEADS, HEAD_DIM), jnp.float32)
    rows = (ints(batch, 64), ints(batch), ints(batch))
    if steps == "one step":
        assert_in_place(layers, POOL, x, *rows)
    else:
        assert_in_place(several_steps, POOL, x, *rows, ints())


def test_transfers_are_in_place():
    staged = jax.ShapeDtypeStruct((LAYERS, 16, *POOL[0].shape[1:]), jnp.float32)
    assert_in_place(scatter_pages, POOL, staged, ints(16))
    assert_in_place(copy_pages, POOL, ints(16), ints(16))


def test_gather_reads_only_its_pages():
    memory = jax.jit(gather_pages).lower(POOL, ints(16)).compile().memory_analysis()
    assert memory.output_size_in_bytes == 16 * POOL_BYTES // NUM_PAGES
    assert memory.temp_size_in_bytes < POOL_BYTES / 50
