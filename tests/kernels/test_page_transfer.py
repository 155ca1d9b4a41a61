"""Every backend of gather, scatter and copy against numpy's indexing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pshare_jax.kernels.native.loop_trace import traced
from pshare_jax.kernels.page_transfer.api import (
    copy_pages,
    gather_pages,
    page_checksums,
    scatter_pages,
)
from tests.helpers import on_device

LAYERS, NUM_PAGES, COUNT = 3, 12, 5
PAGE_SHAPE = (2, 2, 4, 8)
BACKENDS = ["xla", "reference", "cpu_ffi"]


@functools.cache
def compiled(function, backend: str):
    return jax.jit(functools.partial(function, backend=backend))


def random_pool(seed: int, dtype: str) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(seed)
    shape = (LAYERS, NUM_PAGES, *PAGE_SHAPE)
    return tuple(on_device(rng.standard_normal(shape), dtype))


@st.composite
def indices(draw, count: int) -> np.ndarray:
    """`count` distinct pages, the last few of them perhaps padding."""
    pages = draw(st.permutations(range(1, NUM_PAGES)))[:count]
    padding = draw(st.integers(0, COUNT))
    return np.asarray([*pages[: count - padding], *[0] * min(padding, count)], np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_gather(backend, dtype, data):
    pool = random_pool(data.draw(st.integers(0, 99)), dtype)
    index = data.draw(indices(COUNT))
    staged = compiled(gather_pages, backend)(pool, index)
    assert staged.dtype == dtype
    np.testing.assert_array_equal(staged, np.stack([np.asarray(pages)[index] for pages in pool]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_scatter(backend, dtype, data):
    pool = random_pool(data.draw(st.integers(0, 99)), dtype)
    index = data.draw(indices(COUNT))
    rng = np.random.default_rng(1)
    staged = on_device(rng.standard_normal((LAYERS, COUNT, *PAGE_SHAPE)), dtype)
    after = compiled(scatter_pages, backend)(pool, staged, index)
    for layer in range(LAYERS):
        expected = np.array(pool[layer])
        expected[index] = np.asarray(staged)[layer]
        assert after[layer].dtype == dtype
        np.testing.assert_array_equal(np.asarray(after[layer])[1:], expected[1:])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_copy(backend, data):
    pool = random_pool(data.draw(st.integers(0, 99)), "float32")
    pages = data.draw(indices(2 * COUNT))
    src, dst = pages[:COUNT], pages[COUNT:]
    src = np.where(dst == 0, 0, src)
    after = compiled(copy_pages, backend)(pool, src, dst)
    for layer in range(LAYERS):
        expected = np.array(pool[layer])
        expected[dst] = expected[src]
        np.testing.assert_array_equal(np.asarray(after[layer])[1:], expected[1:])


def test_one_source_may_go_to_several_pages():
    pool = random_pool(0, "float32")
    after = copy_pages(pool, jnp.asarray([3, 3]), jnp.asarray([1, 2]))
    for before, pages in zip(pool, after, strict=True):
        np.testing.assert_array_equal(pages[1], before[3])
        np.testing.assert_array_equal(pages[2], before[3])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checksums_by_definition(backend, dtype):
    staged = gather_pages(random_pool(3, dtype), jnp.arange(COUNT, dtype=jnp.int32))
    bits = np.asarray(staged).view({"float32": np.uint32, "bfloat16": np.uint16}[dtype])
    words = np.moveaxis(bits, 1, 0).reshape(COUNT, -1).astype(object)
    expected = [sum(int(w) * (2 * i + 1) for i, w in enumerate(page)) % 2**32 for page in words]
    assert compiled(page_checksums, backend)(staged).tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checksum_notices_one_bit_and_two_values_that_changed_places(backend):
    staged = np.asarray(gather_pages(random_pool(4, "bfloat16"), jnp.asarray([5, 6])))
    bits = staged.view(np.uint16)
    checksums = compiled(page_checksums, backend)
    before = checksums(staged)
    flipped, swapped = bits.copy(), bits.copy()
    flipped[2, 1, 0, 1, 3, 7] ^= 1
    swapped[0, 1, 0, 0, 0, 0], swapped[1, 1, 1, 1, 1, 1] = (
        bits[1, 1, 1, 1, 1, 1],
        bits[0, 1, 0, 0, 0, 0],
    )
    assert bits[0, 1, 0, 0, 0, 0] != bits[1, 1, 1, 1, 1, 1]
    for changed in (flipped, swapped):
        after = checksums(changed.view(staged.dtype))
        assert (after[0], after[1] == before[1]) == (before[0], False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checksums_leave_the_team_to_others(dtype):
    """A trace has all calls of the team."""
    staged = gather_pages(random_pool(3, dtype), jnp.arange(COUNT, dtype=jnp.int32))
    sums = {}
    for alone in (True, False):
        program = jax.jit(functools.partial(page_checksums, backend="cpu_ffi", alone=alone))
        with traced(2) as trace:
            sums[alone] = program(staged).tolist()
        assert len(trace.calls) == (0 if alone else 1)
    assert sums[True] == sums[False]


@pytest.mark.parametrize("name", ["gather_pages", "scatter_pages", "copy_pages"])
def test_unknown_backend_is_named(name):
    pool, index = random_pool(0, "float32"), jnp.zeros(1, jnp.int32)
    staged = jnp.zeros((LAYERS, 1, *PAGE_SHAPE))
    call = {
        "gather_pages": lambda: gather_pages(pool, index, backend="tpu"),
        "scatter_pages": lambda: scatter_pages(pool, staged, index, backend="tpu"),
        "copy_pages": lambda: copy_pages(pool, index, index, backend="tpu"),
    }
    with pytest.raises(ValueError, match=f"{name}: unknown backend 'tpu'"):
        call[name]()
