"""Every backend of paged attention against one oracle, with NaN wherever it must not look."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh

from pshare_jax.kernels.over_heads import for_device_kind
from pshare_jax.kernels.paged_attention import pallas_gpu, pallas_tpu
from pshare_jax.kernels.paged_attention.api import paged_attention
from pshare_jax.sharding.rules import pool_sharding, replicated, sharding_for
from tests.helpers import on_device
from tests.kernels.paged_cases import TOLERANCE, Geometry, Rows, assert_equals_oracle, rows
from tests.pairwise import some

TPU = pallas_tpu.Tiles(queries=4, decode_keys=8, prefill_keys=8)
BACKENDS: dict[str, Callable] = {
    "xla": functools.partial(paged_attention, backend="xla"),
    "reference": functools.partial(paged_attention, backend="reference"),
    "cpu_ffi": functools.partial(paged_attention, backend="cpu_ffi"),
    "tpu": functools.partial(pallas_tpu.paged_attention, tiles=TPU, interpret=True),
    "gpu": functools.partial(
        pallas_gpu.paged_attention,
        tiles=pallas_gpu.Tiles(rows=16, keys=16, programs=1),
        interpret=True,
    ),
    "gpu, split": functools.partial(
        pallas_gpu.paged_attention,
        tiles=pallas_gpu.Tiles(rows=16, keys=16, programs=64, split_keys=16),
        interpret=True,
    ),
}
"""The Pallas kernels run in the interpreter, with tiles so small that every loop turns."""
NATIVE = ["xla", "reference", "cpu_ffi"]
PALLAS = ["pallas_tpu_interpret", "pallas_gpu_interpret"]

DECODE = Geometry(3, 1, kv_heads=2, group=3, head_dim=16, page_size=4, pages_per_row=12)
GEOMETRIES = {
    "decode": DECODE,
    "decode, window": Geometry(3, 1, 2, 3, 16, 4, 12, sliding_window=9),
    "decode, one head, one slot a page": Geometry(2, 1, 1, 1, 8, 1, 20),
    "prefix": Geometry(2, 7, 2, 2, 8, 4, 10),
    "prefix, no groups": Geometry(2, 5, 3, 1, 8, 8, 3),
    "prefix, window": Geometry(2, 7, 2, 2, 8, 4, 10, sliding_window=5),
    "decode, soft cap": Geometry(2, 1, 2, 2, 16, 4, 12, soft_cap=0.5),
    "prefix, soft cap": Geometry(2, 7, 2, 2, 8, 4, 10, soft_cap=2.0),
    "window of one": Geometry(2, 3, 1, 2, 8, 4, 4, sliding_window=1),
    "several tiles": Geometry(1, 300, 1, 2, 8, 16, 24),
    "several tiles, window": Geometry(1, 300, 1, 2, 8, 16, 24, sliding_window=130),
    # For the C++ kernel: its sums begin anew every 256 keys, and it takes 64 queries at a time.
    "decode, several chunks": Geometry(2, 1, 2, 3, 64, 16, 48),
    "decode, long window": Geometry(2, 1, 1, 2, 80, 32, 24, sliding_window=300),
    "prefix, several chunks": Geometry(2, 66, 1, 3, 32, 64, 10),
    "prefix, several chunks, window": Geometry(1, 66, 1, 2, 32, 64, 10, sliding_window=200),
    # Tiles of 16 keys would be read as they lie, if they were in one page.
    "prefix, wide heads in small pages": Geometry(2, 3, 1, 2, 32, 4, 10),
    # For what takes long to compile.
    "decode, window, soft cap": Geometry(3, 1, 2, 1, 8, 4, 12, sliding_window=9, soft_cap=0.5),
    "decode, pages larger than a block": Geometry(2, 1, 1, 5, 8, 32, 2),
    "prefix, window, soft cap": Geometry(2, 21, 1, 3, 8, 4, 10, sliding_window=5, soft_cap=2.0),
}
CHOSEN = {
    "xla": {
        "decode": "float32",
        "decode, window, soft cap": "bfloat16",
        "decode, one head, one slot a page": "bfloat16",
        "prefix": "bfloat16",
        "prefix, window, soft cap": "float32",
        "prefix, no groups": "float32",
        "window of one": "float32",
        "several tiles": "float32",
        "several tiles, window": "bfloat16",
    },
    "reference": {
        "decode": "bfloat16",
        "decode, window, soft cap": "float32",
        "decode, one head, one slot a page": "bfloat16",
        "prefix, window, soft cap": "bfloat16",
        "prefix, no groups": "float32",
        "window of one": "float32",
    },
    "tpu": {
        "decode": "float32",
        "decode, window, soft cap": "bfloat16",
        "decode, pages larger than a block": "float32",
        "prefix": "bfloat16",
        "prefix, window, soft cap": "float32",
    },
    "gpu": {
        "decode, window, soft cap": "float32",
        "decode, pages larger than a block": "bfloat16",
        "prefix": "float32",
        "prefix, window, soft cap": "bfloat16",
    },
    "gpu, split": {
        "decode": "bfloat16",
        "decode, pages larger than a block": "float32",
        "prefix, window, soft cap": "bfloat16",
    },
}
"""Every kind of geometry, each in one dtype. The C++ kernel, quickly compiled, has them all."""
CASES = some(
    [
        case
        for case in itertools.product(BACKENDS, GEOMETRIES, TOLERANCE)
        if case[0] in NATIVE or case[1] in CHOSEN["tpu"]  # the interpreter is slow
    ],
    [
        *(
            (backend, geometry, dtype)
            for backend, chosen in CHOSEN.items()
            for geometry, dtype in chosen.items()
        ),
        *itertools.product(["cpu_ffi"], GEOMETRIES, TOLERANCE),
    ],
)


@functools.cache
def compiled(backend: str, sliding_window: int | None, soft_cap: float | None):
    return jax.jit(
        functools.partial(BACKENDS[backend], sliding_window=sliding_window, soft_cap=soft_cap)
    )


@pytest.mark.parametrize(("backend", "geometry", "dtype"), CASES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_equals_the_oracle(backend, geometry, dtype, data):
    geometry = GEOMETRIES[geometry]
    case = data.draw(rows(geometry))
    attend = compiled(backend, geometry.sliding_window, geometry.soft_cap)
    assert_equals_oracle(attend, geometry, dtype, case)


@pytest.mark.parametrize("backend", NATIVE)
def test_terms_that_cancel_out(backend):
    """Here the result is smaller than its terms, whose weights bfloat16 rounds."""
    case = Rows(np.asarray([4, 0], np.int32), np.asarray([1, 0], np.int32), 591)
    geometry = GEOMETRIES["decode, one head, one slot a page"]
    assert_equals_oracle(compiled(backend, None, None), geometry, "bfloat16", case)


@pytest.mark.parametrize("backend", NATIVE)
def test_large_scores_do_not_overflow(backend):
    rng = np.random.default_rng(0)
    geometry = DECODE
    pages = rng.standard_normal((geometry.num_pages, *geometry.page_shape)).astype(np.float32)
    q = 1e4 * np.ones((1, 1, geometry.heads, geometry.head_dim), np.float32)
    table = np.arange(1, 13, dtype=np.int32)[None]
    start, lens = np.asarray([47], np.int32), np.asarray([1], np.int32)
    out = compiled(backend, None, None)(q, pages, table, start, lens)
    # Scores are so far apart that every head returns the value of its best key.
    kv = pages[1:13].transpose(1, 2, 0, 3, 4).reshape(2, geometry.kv_heads, 48, geometry.head_dim)
    best = kv[0].sum(axis=-1).argmax(axis=-1)
    for head in range(geometry.heads):
        kv_head = head // geometry.group
        np.testing.assert_allclose(out[0, 0, head], kv[1, kv_head, best[kv_head]], rtol=1e-5)


def test_heads_must_be_groups():
    q, pages = jnp.zeros((1, 1, 3, 8)), jnp.zeros((2, 2, 2, 4, 8))
    table, row = jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="3 heads are no multiple of 2 KV heads"):
        paged_attention(q, pages, table, row, row)


def test_unknown_backend_is_named():
    q, pages = jnp.zeros((1, 1, 2, 8)), jnp.zeros((2, 2, 2, 4, 8))
    table, row = jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="unknown backend 'cuda'; choose one of auto, xla"):
        paged_attention(q, pages, table, row, row, backend="cuda")


@pytest.mark.parametrize(
    ("backend", "head_dim"),
    some(
        itertools.product(PALLAS, [64, 80, 96, 128, 256]),
        [(PALLAS[0], 64), (PALLAS[0], 80), (PALLAS[0], 256), (PALLAS[1], 96), (PALLAS[1], 128)],
    ),
)
def test_head_dims_and_default_tiles(backend, head_dim):
    geometry = Geometry(2, 2, 1, 2, head_dim, 16, 3)
    case = Rows(np.asarray([30, 5], np.int32), np.asarray([2, 1], np.int32), 0)
    attend = jax.jit(functools.partial(paged_attention, backend=backend))
    assert_equals_oracle(attend, geometry, "float32", case)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("page_size", [16, 256])
def test_head_dims_and_page_sizes_in_cpp(head_dim, page_size, dtype):
    geometry = Geometry(2, 3, 1, 2, head_dim, page_size, 512 // page_size)
    case = Rows(np.asarray([300, 5], np.int32), np.asarray([3, 2], np.int32), 0)
    assert_equals_oracle(compiled("cpu_ffi", None, None), geometry, dtype, case)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 100])
def test_a_query_in_cpp_depends_on_nothing_beside_it(dtype, window):
    """To the bit: not on other rows, nor on how many queries of its row are computed with it."""
    rng = np.random.default_rng(0)
    pages = on_device(rng.standard_normal((70, 2, 2, 16, 32)), dtype)
    table = np.arange(1, 65, dtype=np.int32).reshape(2, 32)
    q = np.asarray(rng.standard_normal((2, 90, 6, 32)), np.float32).astype(jnp.dtype(dtype))
    attend = compiled("cpu_ffi", window, None)
    whole = np.asarray(
        attend(q, pages, table, np.asarray([251, 3], np.int32), np.asarray([90, 70], np.int32))
    )
    for first, count in [(0, 1), (0, 7), (4, 1), (5, 64), (69, 21), (89, 1)]:
        part = attend(
            q[:1, first : first + count],
            pages,
            table[:1],
            np.asarray([251 + first], np.int32),
            np.asarray([count], np.int32),
        )
        np.testing.assert_array_equal(np.asarray(part)[0], whole[0, first : first + count])


@pytest.mark.parametrize(
    ("start", "count", "page", "message"),
    [
        (15, 2, 1, "positions exceed the page table"),
        (-1, 1, 1, "positions exceed the page table"),
        (0, 1, 9, "a page number is out of range"),
        (0, 1, -1, "a page number is out of range"),
        (0, 3, 1, "q_lens exceeds the tokens of the call"),
    ],
)
def test_the_cpp_kernel_refuses_rows_outside_of_the_pool(start, count, page, message):
    q, pages = jnp.zeros((1, 2, 2, 8)), jnp.zeros((9, 2, 2, 16, 8))
    row = np.asarray([start], np.int32), np.asarray([count], np.int32)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(
            compiled("cpu_ffi", None, None)(q, pages, np.asarray([[page]], np.int32), *row)
        )


# Two cores: see test_shared_prefix_attention.py.
@pytest.mark.parametrize("cores", some([1, 2], [1]))
def test_copies_of_the_tpu_kernel_do_not_race(cores):
    """In the simulated memory of a TPU: nothing is read before it has arrived."""
    geometry = Geometry(4, 1, 2, 2, 8, 4, 6)
    case = Rows(np.asarray([20, 0, 3, 9], np.int32), np.asarray([1, 0, 1, 1], np.int32), 0)
    tiles = pallas_tpu.Tiles(queries=4, decode_keys=8, prefill_keys=8, cores=cores)
    attend = functools.partial(
        pallas_tpu.paged_attention,
        sliding_window=None,
        tiles=tiles,
        interpret=pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan"),
    )
    assert_equals_oracle(attend, geometry, "float32", case)


MESHES = {
    "split": (2, 2, 2),
    "shared KV heads": (4, 2, 4),
    "one KV head": (4, 1, 4),
    "straddling heads": (4, 3, 4),
    "indivisible heads": (4, 3, 1),
}
"""Degree, KV heads and heads of each."""


@pytest.mark.parametrize(
    ("backend", "layout"),
    some(
        itertools.product(PALLAS, MESHES),
        [
            (PALLAS[0], "shared KV heads"),
            (PALLAS[0], "straddling heads"),
            (PALLAS[1], "split"),
            (PALLAS[1], "one KV head"),
            (PALLAS[1], "indivisible heads"),
        ],
    ),
)
def test_same_numbers_on_a_mesh(backend, layout):
    degree, kv_heads, group = MESHES[layout]
    # Few pages a row: the TPU kernel's copies of a block's pages are unrolled.
    geometry = Geometry(2, 1, kv_heads, group, 8, 16, 2)
    case = Rows(np.asarray([20, 6], np.int32), np.asarray([1, 1], np.int32), 0)
    mesh = Mesh(np.asarray(jax.devices()[:degree]), ("tensor",))
    heads = sharding_for(mesh, (1, 1, geometry.heads, 1), (None, None, "heads", "head_dim"))
    whole = replicated(mesh)
    attend = jax.jit(
        functools.partial(paged_attention, mesh=mesh, backend=backend),
        in_shardings=(heads, pool_sharding(mesh, kv_heads), whole, whole, whole),
        out_shardings=heads,
    )
    assert_equals_oracle(attend, geometry, "float32", case)


class _Device:
    def __init__(self, kind: str):
        self.device_kind = kind


class _Mesh:
    def __init__(self, kind: str):
        self.devices = np.asarray([_Device(kind)])


def test_tile_sizes_go_by_the_kind_of_the_mesh_devices():
    default = pallas_tpu.Tiles()
    for table in (pallas_tpu.TILES, pallas_gpu.TILES):
        for kind, tiles in table.items():
            assert for_device_kind(table, _Mesh(kind), default) is tiles
        assert for_device_kind(table, _Mesh("another"), default) is default
        assert for_device_kind(table, None, default) is default
