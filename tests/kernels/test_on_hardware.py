"""The Pallas kernels on the hardware they are for; see docs/accelerators.md for the command."""

import functools

import jax
import pytest
from hypothesis import given, settings

from pshare_jax.kernels.paged_attention.api import paged_attention
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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("platform", PLATFORMS)
def test_attention_equals_the_oracle(platform, geometry, dtype):
    if jax.default_backend() != platform:
        pytest.skip(f"needs a {platform}, but JAX runs on {jax.default_backend()}")
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
