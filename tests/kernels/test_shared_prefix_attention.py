"""Shared-prefix attention against the oracle, with NaN wherever it must not look."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh

from pshare_jax.kernels.paged_attention.pallas_gpu import Tiles as GpuTiles
from pshare_jax.kernels.paged_attention.pallas_tpu import Tiles as TpuTiles
from pshare_jax.kernels.shared_prefix_attention import pallas_gpu, pallas_tpu
from pshare_jax.kernels.shared_prefix_attention.api import shared_prefix_attention
from pshare_jax.sharding.rules import pool_sharding, replicated, sharding_for
from tests.helpers import on_device
from tests.kernels.paged_cases import (
    TOLERANCE,
    Geometry,
    Rows,
    attention_oracle,
    filled_pages,
    page_tables,
    relative_error,
    rows,
)
from tests.pairwise import pairwise, some

GEOMETRIES = {
    "groups": Geometry(6, 1, kv_heads=2, group=3, head_dim=16, page_size=4, pages_per_row=12),
    "window, soft cap": Geometry(6, 1, 1, 2, 8, 4, 12, sliding_window=9, soft_cap=0.5),
}
MEMBERS = np.asarray([[4, 1, 6], [0, 6, 6], [2, 5, 3]], np.int32)
"""Three groups of six rows, one of a single row, in no order; 6 is an empty place."""


def tpu(cores: int, interpret=True):
    tiles = TpuTiles(queries=2, decode_keys=8, prefill_keys=8, cores=cores)
    return functools.partial(pallas_tpu.shared_prefix_attention, tiles=tiles, interpret=interpret)


def gpu(programs: int):
    tiles = GpuTiles(rows=16, keys=16, programs=programs, split_keys=16)
    return functools.partial(pallas_gpu.shared_prefix_attention, tiles=tiles, interpret=True)


BACKENDS = {
    "xla": functools.partial(shared_prefix_attention, backend="xla"),
    "reference": functools.partial(shared_prefix_attention, backend="reference"),
    "tpu": tpu(cores=1),
    "tpu, two cores": tpu(cores=2),
    "gpu": gpu(programs=1),
    "gpu, split": gpu(programs=64),
}
"""The Pallas kernels run in the interpreter, with tiles so small that every loop turns."""


@functools.cache
def compiled(backend, sliding_window, soft_cap):
    return jax.jit(
        functools.partial(BACKENDS[backend], sliding_window=sliding_window, soft_cap=soft_cap)
    )


def share_runs(geometry, case, table, longest):
    """Gives the members of each group the same first pages; returns the lengths of the runs."""
    lens = []
    for group, most in zip(MEMBERS, longest, strict=True):
        valid = [row for row in group if row < geometry.batch and case.lens[row]]
        if not valid:
            lens.append(most * geometry.page_size)
            continue
        leader = min(valid, key=lambda row: case.start[row])
        run = min(most, int(case.start[leader] + 1) // geometry.page_size)
        table[valid, :run] = table[leader, :run]
        lens.append(run * geometry.page_size)
    return np.asarray(lens, np.int32)


def check(backend, geometry, dtype, case, longest):
    attend = compiled(backend, geometry.sliding_window, geometry.soft_cap)
    assert_equals_the_oracle(attend, geometry, dtype, case, longest)


def assert_equals_the_oracle(attend, geometry, dtype, case, longest):
    rng = np.random.default_rng(case.seed)
    table = page_tables(geometry, case, rng)
    run_lens = share_runs(geometry, case, table, longest)
    pages = on_device(filled_pages(geometry, case, table, rng), dtype)
    q = on_device(
        rng.standard_normal((geometry.batch, 1, geometry.heads, geometry.head_dim)), dtype
    )
    out = attend(q, pages, table, case.start, case.lens, MEMBERS, run_lens)
    assert out.shape == q.shape
    assert out.dtype == dtype
    actual = np.asarray(out, np.float32)
    assert np.isfinite(actual).all()
    valid = case.lens == 1
    expected, spread = attention_oracle(geometry, np.asarray(q), np.asarray(pages), table, case)
    error = relative_error(actual[valid], expected[valid], spread[valid], dtype)
    assert error <= TOLERANCE[dtype]


@pairwise(backend=BACKENDS, geometry=GEOMETRIES, dtype=TOLERANCE)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_equals_the_oracle(backend, geometry, dtype, data):
    geometry = GEOMETRIES[geometry]
    case = data.draw(rows(geometry))
    longest = data.draw(st.tuples(*[st.integers(0, geometry.pages_per_row)] * len(MEMBERS)))
    check(backend, geometry, dtype, case, longest)


def rows_at(start):
    return Rows(np.asarray(start, np.int32), np.ones(len(start), np.int32), 0)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_a_run_is_read_from_one_member_only(backend):
    """The other member's table does not hold the run: plain paged attention would read NaN."""
    geometry, rng = GEOMETRIES["groups"], np.random.default_rng(0)
    # The program of the test above.
    case = Rows(
        np.asarray([4, 5, 4, 4, 4, 4], np.int32), np.asarray([1, 1, 0, 0, 0, 0], np.int32), 0
    )
    members = np.asarray([[0, 1, 6], [6, 6, 6], [6, 6, 6]], np.int32)
    run = np.asarray([4, 0, 0], np.int32)
    pages = np.full((geometry.num_pages, *geometry.page_shape), np.nan, np.float32)
    pages[1:4] = rng.standard_normal((3, *geometry.page_shape))
    q = rng.standard_normal((6, 1, geometry.heads, geometry.head_dim), np.float32)
    table = np.zeros((6, geometry.pages_per_row), np.int32)
    table[:2, :2] = [[1, 2], [1, 3]]
    call = compiled(backend, None, None)
    same = call(q, pages, table, case.start, case.lens, members, run)
    assert np.isfinite(same).all()
    table[1, 0] = 0
    hole = call(q, pages, table, case.start, case.lens, members, run)
    np.testing.assert_array_equal(same, hole)


# One core's copies are those of plain paged attention, see test_paged_attention.py.
@pytest.mark.parametrize("cores", some([1, 2], [2]))
def test_copies_of_the_tpu_kernel_do_not_race(cores):
    """In the simulated memory of a TPU: nothing is read before it has arrived."""
    simulated = pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan")
    geometry = Geometry(6, 1, 2, 2, 8, 4, 12, sliding_window=9)
    attend = functools.partial(tpu(cores, simulated), sliding_window=9)
    assert_equals_the_oracle(
        attend, geometry, "float32", rows_at([20, 7, 40, 33, 9, 47]), (2, 1, 8)
    )


MESHES = {"split": (2, 2, 2), "shared KV heads": (4, 2, 4), "straddling heads": (4, 3, 4)}
"""Degree, KV heads and heads of each."""


@pytest.mark.parametrize(
    ("backend", "layout"),
    some(
        itertools.product(["pallas_tpu_interpret", "pallas_gpu_interpret", "xla"], MESHES),
        [
            ("pallas_tpu_interpret", "shared KV heads"),
            ("pallas_gpu_interpret", "straddling heads"),
            *(("xla", layout) for layout in MESHES),
        ],
    ),
)
def test_same_numbers_on_a_mesh(backend, layout):
    degree, kv_heads, group = MESHES[layout]
    # Few pages a row: the TPU kernel's copies of a block's pages are unrolled.
    geometry = Geometry(6, 1, kv_heads, group, 8, 16, 3)
    mesh = Mesh(np.asarray(jax.devices()[:degree]), ("tensor",))
    heads = sharding_for(mesh, (1, 1, geometry.heads, 1), (None, None, "heads", "head_dim"))
    attend = jax.jit(
        functools.partial(shared_prefix_attention, mesh=mesh, backend=backend),
        in_shardings=(heads, pool_sharding(mesh, kv_heads), *[replicated(mesh)] * 5),
        out_shardings=heads,
    )
    assert_equals_the_oracle(
        attend, geometry, "float32", rows_at([20, 17, 40, 33, 19, 47]), (2, 1, 8)
    )


@pytest.mark.parametrize(
    ("tokens", "heads", "groups", "message"),
    [
        (2, 2, 1, "takes one query a row, not 2"),
        (1, 3, 1, "3 heads are no multiple of 2 KV heads"),
        (1, 2, 2, "members has 1 groups, run_lens 2"),
    ],
)
def test_shapes_that_do_not_fit_are_named(tokens, heads, groups, message):
    q, pages = jnp.zeros((1, tokens, heads, 8)), jnp.zeros((2, 2, 2, 4, 8))
    table, row = jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
    runs = jnp.zeros(groups, jnp.int32)
    with pytest.raises(ValueError, match=message):
        shared_prefix_attention(q, pages, table, row, row, table, runs)
