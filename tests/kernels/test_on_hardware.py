"""The Pallas kernels on the hardware they are for; see docs/accelerators.md for the command."""

import functools

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pshare_jax.kernels.kv_write.api import kv_write
from pshare_jax.kernels.paged_attention.api import paged_attention
from pshare_jax.kernels.shared_prefix_attention.api import shared_prefix_attention
from tests.kernels import test_kv_write, test_shared_prefix_attention
from tests.kernels.paged_cases import TOLERANCE, Geometry, assert_equals_oracle, rows

PLATFORMS = [
    pytest.param("tpu", marks=pytest.mark.tpu),
    pytest.param("gpu", marks=pytest.mark.gpu),
]
GEOMETRIES = {
    "decode": Geometry(8, 1, kv_heads=2, group=4, head_dim=128, page_size=32, pages_per_row=8),
    "decode, window, soft cap": Geometry(4, 1, 3, 3, 64, 16, 16, sliding_window=50, soft_cap=2.0),
    "decode, head of 80": Geometry(4, 1, 2, 5, 80, 64, 4),
    "prefix": Geometry(2, 100, 2, 4, 128, 32, 8),
    "prefix, head of 256": Geometry(2, 70, 1, 8, 256, 64, 4, sliding_window=100),
}


SHARED_GEOMETRIES = {
    "groups": Geometry(6, 1, kv_heads=2, group=4, head_dim=128, page_size=32, pages_per_row=12),
    "window, soft cap": Geometry(6, 1, 2, 3, 64, 16, 12, sliding_window=50, soft_cap=2.0),
}
WRITE_GEOMETRIES = {
    "one token a row": Geometry(
        8, 1, kv_heads=2, group=1, head_dim=128, page_size=32, pages_per_row=8
    ),
    "several tokens": Geometry(2, 100, 2, 1, 64, 16, 12),
}


def need(platform):
    if jax.default_backend() != platform:
        pytest.skip(f"needs a {platform}, but JAX runs on {jax.default_backend()}")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("platform", PLATFORMS)
def test_attention_equals_the_oracle(platform, geometry, dtype):
    need(platform)
    attend = jax.jit(
        functools.partial(
            paged_attention,
            sliding_window=geometry.sliding_window,
            soft_cap=geometry.soft_cap,
            backend=f"pallas_{platform}",
        )
    )

    @settings(max_examples=12, deadline=None)
    @given(case=rows(geometry))
    def check(case):
        assert_equals_oracle(attend, geometry, dtype, case)

    check()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("geometry", SHARED_GEOMETRIES.values(), ids=SHARED_GEOMETRIES.keys())
@pytest.mark.parametrize("platform", PLATFORMS)
def test_shared_prefix_attention_equals_the_oracle(platform, geometry, dtype):
    need(platform)
    attend = jax.jit(
        functools.partial(
            shared_prefix_attention,
            sliding_window=geometry.sliding_window,
            soft_cap=geometry.soft_cap,
            backend=f"pallas_{platform}",
        )
    )
    longest = st.tuples(
        *[st.integers(0, geometry.pages_per_row)] * len(test_shared_prefix_attention.MEMBERS)
    )

    @settings(max_examples=12, deadline=None)
    @given(case=rows(geometry), longest=longest)
    def check(case, longest):
        test_shared_prefix_attention.assert_equals_the_oracle(
            attend, geometry, dtype, case, longest
        )

    check()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("geometry", WRITE_GEOMETRIES.values(), ids=WRITE_GEOMETRIES.keys())
@pytest.mark.parametrize("platform", PLATFORMS)
def test_kv_write_writes_valid_tokens_and_nothing_else(platform, geometry, dtype):
    need(platform)
    write = jax.jit(functools.partial(kv_write, backend=f"pallas_{platform}"))

    @settings(max_examples=12, deadline=None)
    @given(case=rows(geometry))
    def check(case):
        test_kv_write.assert_writes_valid_tokens(write, geometry, dtype, case)

    check()
