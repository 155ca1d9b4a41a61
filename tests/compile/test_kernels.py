"""The production compilers take the kernels, write in place, and refuse blocks that are too big."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pshare_jax.bench.accelerators import ACCELERATORS
from pshare_jax.bench.compile import compile_program, device_of
from pshare_jax.bench.compile_kernels import KERNEL_CASES, kernel_program
from pshare_jax.bench.shared_prefix_programs import SHARED_CASES, attention_program
from pshare_jax.kernels.kv_write.xla import kv_write as xla_kv_write
from pshare_jax.kernels.paged_attention import pallas_gpu, pallas_tpu
from tests.compile.rows import spread

pytestmark = pytest.mark.compile


@pytest.mark.parametrize(("name", "case"), spread(KERNEL_CASES))
def test_kernels_compile_and_write_in_place(name, case):
    accelerator = ACCELERATORS[name]
    compiled = compile_program(accelerator, kernel_program(accelerator, case), layers=1)
    assert compiled.pool_in_place
    assert compiled.total_bytes < accelerator.memory


def attention_arguments(name: str, head_dim: int = 128):
    """Abstract arguments of one device: 4 rows of 64 queries over 512 MiB of pages."""
    mesh = Mesh(ACCELERATORS[name].devices()[:1], ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = ((4, 64, 8, head_dim), (4096, 2, 8, 32, head_dim))
    q, pages = (jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding) for s in shapes)
    table, row = (jax.ShapeDtypeStruct(s, jnp.int32, sharding=sharding) for s in ((4, 512), (4,)))
    return q, pages, table, row, row


def compile_attention(name: str, kernel, tiles):
    attend = jax.jit(functools.partial(kernel, sliding_window=None, tiles=tiles))
    arguments = attention_arguments(name)
    with device_of(ACCELERATORS[name], arguments):
        return attend.lower(*arguments).compile()


def test_the_gpu_kernel_becomes_machine_code():
    compiled = compile_attention("h100", pallas_gpu.paged_attention, pallas_gpu.Tiles())
    assert b"\x7fELF" in compiled.runtime_executable().serialize()


@pytest.mark.parametrize("name", ["v5e:2x4", "v6e:2x4"])
def test_blocks_that_do_not_fit_vmem_are_refused(name):
    tiles = pallas_tpu.Tiles(prefill_keys=16384)
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compile_attention(name, pallas_tpu.paged_attention, tiles)


def test_blocks_that_do_not_fit_shared_memory_are_refused():
    tiles = pallas_gpu.Tiles(rows=128, keys=512, num_stages=3)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"[Ss]hared memory"):
        compile_attention("h100", pallas_gpu.paged_attention, tiles)


def test_a_copy_of_the_pages_is_seen():
    """XLA's scatter, which the TPU kernel replaces, transposes the pages: the check can fail."""
    q, pages, *rows = attention_arguments("v6e:2x4")
    scatter = jax.jit(xla_kv_write, donate_argnums=0)
    memory = scatter.lower(pages, q, q, *rows).compile().memory_analysis()
    assert memory.temp_size_in_bytes >= pages.size * pages.dtype.itemsize


@pytest.mark.parametrize(("name", "case"), spread(SHARED_CASES))
def test_shared_prefix_attention_compiles_and_leaves_the_pages_in_place(name, case):
    accelerator = ACCELERATORS[name]
    program = attention_program(accelerator, case, 2048, shared=True)
    compiled = compile_program(accelerator, program, layers=1)
    assert compiled.pool_in_place
    assert compiled.total_bytes < accelerator.memory
