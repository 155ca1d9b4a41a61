"""What `bench hardware` runs on an accelerator compiles for those that are known, and fits."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from pshare_jax.bench.accelerators import ACCELERATORS
from pshare_jax.bench.compile import compile_program
from pshare_jax.bench.compile_kernels import KernelCase, kernel_program
from pshare_jax.bench.compile_programs import Sizes, one_chip_programs
from pshare_jax.bench.hardware.codec import CODECS, ROOM, made_up
from pshare_jax.bench.hardware.scale import FULL, SHAPE_1B, SHAPE_8B
from pshare_jax.kernels.kv_codec import xla
from pshare_jax.kernels.kv_codec.codebook import calibrate
from pshare_jax.models.weights import weight_specs

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("tokens", [1, FULL.chunk])
@pytest.mark.parametrize("name", ACCELERATORS)
def test_attention_of_both_models(name, tokens):
    """One of them by token, the other one by chunk: on the next machine it is the other way."""
    model = (SHAPE_1B, SHAPE_8B)[(list(ACCELERATORS).index(name) + (tokens == 1)) % 2]
    batch = FULL.batch if tokens == 1 else 1
    heads = (model.num_heads, model.num_kv_heads, model.head_dim)
    case = KernelCase(batch, tokens, *heads, FULL.page_size, FULL.dtype)
    compiled = compile_program(ACCELERATORS[name], kernel_program(ACCELERATORS[name], case), 1)
    assert compiled.pool_in_place


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["v6e:2x4", "h100"])
def test_the_steps_of_the_small_model(name):
    """Two of its layers: all are alike."""
    accelerator = ACCELERATORS[name]
    part = dataclasses.replace(SHAPE_1B, num_layers=2)
    sizes = Sizes(batch=FULL.batch, context=FULL.context + 512, chunk=FULL.chunk)
    for program in one_chip_programs(accelerator, SHAPE_1B, sizes, part):
        compiled = compile_program(accelerator, program, SHAPE_1B.num_layers)
        assert compiled.pool_in_place or not program.pool_bytes, program.name
        assert compiled.total_bytes < accelerator.memory, program.name


@pytest.mark.parametrize("codec", CODECS)
def test_the_codec_of_the_large_models_pages(codec):
    """On a GPU: a TPU's compiler takes minutes for it, so that it is not measured there."""
    name = "h100"
    model, here = FULL.large, SingleDeviceSharding(ACCELERATORS[name].devices()[0])
    shape = (model.num_layers, 2, model.num_kv_heads, FULL.page_size, model.head_dim)
    book = calibrate(codec, made_up(shape, 1))
    capacity = int(ROOM * book.fixed_bytes(math.prod(shape)))
    count = FULL.codec_pages
    pages = jax.ShapeDtypeStruct((count, *shape), jnp.bfloat16, sharding=here)
    records = jax.ShapeDtypeStruct((count, capacity), jnp.uint8, sharding=here)
    encode = jax.jit(lambda x: xla.encode(book, x, capacity))
    decode = jax.jit(lambda r: xla.decode(book, r, shape))
    for compiled in (encode.lower(pages).compile(), decode.lower(records).compile()):
        memory = compiled.memory_analysis()
        assert memory.temp_size_in_bytes < ACCELERATORS[name].memory / 2


@pytest.mark.parametrize("name", ACCELERATORS)
def test_weights_are_made_without_a_second_copy(name):
    """The largest one, of the large model: made in its own dtype."""
    here = SingleDeviceSharding(ACCELERATORS[name].devices()[0])
    spec = weight_specs(SHAPE_8B)["lm_head.kernel"]

    def make(key):
        return jax.random.normal(key, spec.shape, jnp.bfloat16)

    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=here)
    memory = jax.jit(make, out_shardings=here).lower(key).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * np.prod(spec.shape) * 2
