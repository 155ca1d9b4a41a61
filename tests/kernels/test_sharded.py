"""The XLA backends under tensor parallelism: same numbers, and pages that stay where they are."""

import functools
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from pshare_jax.kernels.kv_write.api import kv_write
from pshare_jax.kernels.page_transfer.api import copy_pages, gather_pages, scatter_pages
from pshare_jax.kernels.paged_attention.api import paged_attention
from pshare_jax.sharding.rules import pool_sharding, replicated, sharding_for
from tests.kernels.paged_cases import Geometry, Rows, attention_oracle, filled_pages, page_tables
from tests.pairwise import some

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def mesh_of(degree: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()[:degree]), ("tensor",))


def step(q, k, v, pages, table, start, lens, *, sliding_window):
    pages = kv_write(pages, k, v, table, start, lens, backend="xla")
    out = paged_attention(
        q, pages, table, start, lens, sliding_window=sliding_window, backend="xla"
    )
    return out, pages


def expected_pages(geometry, case, table, pages, k, v):
    """`pages` with the rows' new keys and values."""
    pages = pages.copy()
    for row, (start, count) in enumerate(zip(case.start, case.lens, strict=True)):
        for token in range(count):
            page, slot = divmod(start + token, geometry.page_size)
            pages[table[row, page], :, :, slot] = k[row, token], v[row, token]
    return pages


LAYOUTS = [(1, 4, 2), (2, 4, 2), (4, 4, 2), (4, 4, 1), (4, 2, 2), (4, 1, 4), (2, 3, 3), (4, 2, 6)]
"""Degree, KV heads and heads of each."""
DECODED, PREFILLED = (1, 1, 0, 1, 0, 1, 1, 0), (0, 1, 1, 0, 1, 0, 1, 1)
CHOSEN = [
    (*layout, tokens)
    for tokens, chosen in ((1, DECODED), (6, PREFILLED))
    for layout in itertools.compress(LAYOUTS, chosen)
]


@pytest.mark.parametrize(
    ("degree", "kv_heads", "group", "tokens"),
    some([(*layout, tokens) for layout in LAYOUTS for tokens in (1, 6)], CHOSEN),
)
def test_same_numbers_at_every_degree(degree, kv_heads, group, tokens):
    geometry = Geometry(3, tokens, kv_heads, group, 8, 4, 12, sliding_window=20)
    case = Rows(np.asarray([0, 9, 36], np.int32), np.asarray([tokens, 0, tokens], np.int32), 0)
    rng = np.random.default_rng(0)
    table = page_tables(geometry, case, rng)
    pages = filled_pages(geometry, case, table, rng)
    q = rng.standard_normal((3, tokens, geometry.heads, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 3, tokens, kv_heads, 8)).astype(np.float32)
    arguments = (q, k, v, pages, table, case.start, case.lens)
    expected_kv = expected_pages(geometry, case, table, pages, k, v)
    expected, _ = attention_oracle(geometry, q, expected_kv, table, case)

    mesh = mesh_of(degree)
    heads = sharding_for(mesh, q.shape, (None, None, "heads", "head_dim"))
    kv = sharding_for(mesh, k.shape, (None, None, "kv_heads", "head_dim"))
    pool, rows = pool_sharding(mesh, kv_heads), replicated(mesh)
    jitted = jax.jit(
        functools.partial(step, sliding_window=geometry.sliding_window),
        in_shardings=(heads, kv, kv, pool, rows, rows, rows),
        out_shardings=(heads, pool),
        donate_argnums=3,
    )
    placed = jax.device_put(arguments, (heads, kv, kv, pool, rows, rows, rows))
    compiled = jitted.lower(*placed).compile()
    out, new_pages = compiled(*placed)

    valid = np.arange(tokens) < case.lens[:, None]
    assert np.isfinite(np.asarray(out)).all()
    np.testing.assert_allclose(np.asarray(out)[valid], expected[valid], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(new_pages)[1:], expected_kv[1:])
    assert new_pages.sharding.is_equivalent_to(pool, new_pages.ndim)
    if kv_heads % degree == 0:
        hlo = compiled.as_text()
        assert not [name for name in COLLECTIVES if name in hlo]


@pytest.mark.parametrize("degree", [2, 4])
def test_transfers_move_no_pages_between_devices(degree):
    mesh, rng = mesh_of(degree), np.random.default_rng(0)
    pool = tuple(rng.standard_normal((2, 9, 2, 4, 4, 8)).astype(np.float32))
    sharding = pool_sharding(mesh, 4)
    staging = sharding_for(mesh, (2, 3, 2, 4, 4, 8), (None, None, None, "kv_heads", None, None))
    src, dst = np.asarray([3, 1, 8], np.int32), np.asarray([2, 5, 4], np.int32)

    def move(pool, src, dst):
        staged = gather_pages(pool, src)
        return copy_pages(scatter_pages(pool, staged, dst), dst, src), staged

    jitted = jax.jit(move, out_shardings=(sharding, staging))
    placed = jax.device_put(pool, sharding)
    compiled = jitted.lower(placed, src, dst).compile()
    hlo = compiled.as_text()
    assert not [name for name in COLLECTIVES if name in hlo]
    after, staged = compiled(placed, src, dst)
    for layer in range(2):
        np.testing.assert_array_equal(staged[layer], pool[layer][src])
        expected = pool[layer].copy()
        expected[dst] = expected[src]
        np.testing.assert_array_equal(after[layer], expected)
