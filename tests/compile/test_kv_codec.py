"""The production compilers take the codec of KV pages, for coding around a transfer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from pshare_jax.bench.accelerators import ACCELERATORS
from pshare_jax.kernels.kv_codec import xla
from pshare_jax.kernels.kv_codec.codebook import Codebook

pytestmark = pytest.mark.compile

CASES = [("v5e:2x4", "planes"), ("v6e:2x4", "top16"), ("h100", "planes"), ("h100", "top16")]
"""Plain XLA, which compiles for one TPU as for another, and takes minutes for the scatter of
escapes: each codec for one of them."""
SHAPE = (2, 2, 3, 64, 64)
PAGES = 1


def codebook(codec: str, shape: tuple[int, ...]) -> Codebook:
    layers, two, heads, _, head_dim = shape
    table = (layers, two, heads, head_dim) if codec == "planes" else (15,)
    return Codebook(codec, np.resize(np.arange(100, 115, dtype=np.uint8), table))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "codec"), CASES)
def test_the_codec_compiles(name, codec):
    sharding = SingleDeviceSharding(ACCELERATORS[name].devices()[0])
    book, values = codebook(codec, SHAPE), int(np.prod(SHAPE))
    capacity = book.fixed_bytes(values) + values // 25
    pages = jax.ShapeDtypeStruct((PAGES, *SHAPE), jnp.bfloat16, sharding=sharding)
    records = jax.ShapeDtypeStruct((PAGES, capacity), jnp.uint8, sharding=sharding)
    encode = jax.jit(lambda x: xla.encode(book, x, capacity)).lower(pages).compile()
    decode = jax.jit(lambda x: xla.decode(book, x, SHAPE)).lower(records).compile()
    for compiled in (encode, decode):
        memory = compiled.memory_analysis()
        used = memory.temp_size_in_bytes + memory.output_size_in_bytes
        # Intermediate values of 4 bytes: a few times what goes in, and tiles that are not full.
        assert used < 64 * PAGES * values + (4 << 20)
