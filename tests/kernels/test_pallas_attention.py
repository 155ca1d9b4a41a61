"""The Pallas attention kernels in the interpreter, with tiles so small that every loop turns."""

import functools
from collections.abc import Callable

import jax
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
from tests.kernels.paged_cases import Geometry, Rows, assert_equals_oracle, rows

TPU = pallas_tpu.Tiles(queries=4, decode_keys=8, prefill_keys=8)
KERNELS: dict[str, Callable] = {
    "tpu": functools.partial(pallas_tpu.paged_attention, tiles=TPU),
    "gpu": functools.partial(
        pallas_gpu.paged_attention, tiles=pallas_gpu.Tiles(rows=16, keys=16, programs=1)
    ),
    "gpu, split": functools.partial(
        pallas_gpu.paged_attention,
        tiles=pallas_gpu.Tiles(rows=16, keys=16, programs=64, split_keys=16),
    ),
}

GEOMETRIES = {
    "decode": Geometry(3, 1, kv_heads=2, group=3, head_dim=16, page_size=4, pages_per_row=12),
    "decode, window, soft cap": Geometry(3, 1, 2, 1, 8, 4, 12, sliding_window=9, soft_cap=0.5),
    "decode, pages larger than a block": Geometry(2, 1, 1, 5, 8, 32, 2),
    "prefix": Geometry(2, 7, 2, 2, 8, 4, 10),
    "prefix, window, soft cap": Geometry(2, 21, 1, 3, 8, 4, 10, sliding_window=5, soft_cap=2.0),
}


@functools.cache
def compiled(kernel: str, sliding_window: int | None, soft_cap: float | None):
    return jax.jit(
        functools.partial(
            KERNELS[kernel], sliding_window=sliding_window, soft_cap=soft_cap, interpret=True
        )
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_equals_the_oracle(kernel, geometry, dtype, data):
    case = data.draw(rows(geometry))
    attend = compiled(kernel, geometry.sliding_window, geometry.soft_cap)
    assert_equals_oracle(attend, geometry, dtype, case)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("backend", ["pallas_tpu_interpret", "pallas_gpu_interpret"])
def test_head_dims_and_default_tiles(backend, head_dim):
    geometry = Geometry(2, 2, 1, 2, head_dim, 16, 3)
    case = Rows(np.asarray([30, 5], np.int32), np.asarray([2, 1], np.int32), 0)
    attend = jax.jit(functools.partial(paged_attention, backend=backend))
    assert_equals_oracle(attend, geometry, "float32", case)


@pytest.mark.parametrize("cores", [1, 2])
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


@pytest.mark.parametrize(
    ("degree", "kv_heads", "group"),
    [(2, 2, 2), (4, 2, 4), (4, 1, 4), (4, 3, 4), (4, 3, 1)],
    ids=["split", "shared KV heads", "one KV head", "straddling heads", "indivisible heads"],
)
@pytest.mark.parametrize("backend", ["pallas_tpu_interpret", "pallas_gpu_interpret"])
def test_same_numbers_on_a_mesh(backend, degree, kv_heads, group):
    geometry = Geometry(2, 1, kv_heads, group, 8, 4, 6)
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
