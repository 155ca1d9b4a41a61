"""Every backend of kv_write against a loop over tokens; page 0 takes what is padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pshare_jax.kernels.kv_write.api import kv_write
from tests.helpers import on_device
from tests.kernels.paged_cases import Geometry, page_tables, rows
from tests.pairwise import pairwise

BACKENDS = ["xla", "reference", "cpu_ffi", "pallas_tpu_interpret"]

GEOMETRIES = {
    "one token a row": Geometry(
        4, 1, kv_heads=2, group=1, head_dim=8, page_size=4, pages_per_row=3
    ),
    "one token a row, wide pages": Geometry(3, 1, 2, 1, 8, 32, 3),
    "several tokens": Geometry(3, 7, 3, 1, 8, 4, 6),
    "pages of one slot": Geometry(2, 3, 1, 1, 8, 1, 9),
    "more than a page": Geometry(2, 20, 2, 1, 8, 8, 5),
}


@functools.cache
def compiled(backend: str):
    return jax.jit(functools.partial(kv_write, backend=backend))


@pairwise(backend=BACKENDS, geometry=GEOMETRIES, dtype=["float32", "bfloat16"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_writes_valid_tokens_and_nothing_else(backend, geometry, dtype, data):
    geometry = GEOMETRIES[geometry]
    assert_writes_valid_tokens(compiled(backend), geometry, dtype, data.draw(rows(geometry)))


def assert_writes_valid_tokens(write, geometry, dtype, case):
    rng = np.random.default_rng(case.seed)
    table = page_tables(geometry, case, rng)
    before = on_device(rng.standard_normal((geometry.num_pages, *geometry.page_shape)), dtype)
    k, v = rng.standard_normal(
        (2, geometry.batch, geometry.tokens, geometry.kv_heads, geometry.head_dim)
    ).astype(np.float32)
    # Padding may be anything.
    padding = np.arange(geometry.tokens) >= case.lens[:, None]
    k[padding] = v[padding] = np.nan

    after = write(before, k, v, table, case.start, case.lens)

    expected = np.array(before)
    rounded_k, rounded_v = (np.asarray(on_device(values, dtype)) for values in (k, v))
    for row in range(geometry.batch):
        for token in range(case.lens[row]):
            page, slot = divmod(int(case.start[row]) + token, geometry.page_size)
            expected[table[row, page], 0, :, slot] = rounded_k[row, token]
            expected[table[row, page], 1, :, slot] = rounded_v[row, token]
    assert after.dtype == dtype
    np.testing.assert_array_equal(np.asarray(after)[1:], expected[1:])


def test_unknown_backend_is_named():
    pages, kv = jnp.zeros((2, 2, 1, 4, 8)), jnp.zeros((1, 1, 1, 8))
    table, row = jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="kv_write: unknown backend 'tpu'"):
        kv_write(pages, kv, kv, table, row, row, backend="tpu")
