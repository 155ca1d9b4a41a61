"""Products with weights of 8 bits: the same whole numbers on every kind of CPU, and in XLA."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from pshare_jax.kernels.matmul.rounded import GROUP, rounded, rounded_matmul
from pshare_jax.kernels.native import library

SOURCE = """
#include "int8.h"
using namespace pshare;
extern "C" int panel_columns() { return kPanel; }
extern "C" void product(const float* x, long rows, long k, const Int8* panels, const float* scales,
                        long columns, float* out, long first, long count) {
  static RoundedBuffer memory;
  RoundedRows rounded = memory.get(rows, k);
  for (long r = 0; r < rows; r++) round_row(x + r * k, rounded, r);
  for (long p = 0; p < columns / kPanel; p++) {
    multiply_panel(rounded, first, count, {panels, scales}, p, out + p * kPanel, columns);
  }
}
"""
X86 = {
    "this CPU": "-march=native",
    "this CPU without products of bytes": "-march=native -DPSHARE_PAIRS",
    "AVX2": "-march=x86-64-v3",
    "AVX": "-march=x86-64 -mavx",  # has no products of whole numbers: the portable ones
    "SSE2": "-march=x86-64",
}
SETS = X86 if platform.machine() == "x86_64" else {"this CPU": "-mcpu=native"}
DEPTHS = [1, 5, 128, 130, 577, 1536]


class Products:
    """`x [rows, K]` times `kernel [K, N]` int8 with `scales [N]`, compiled for one kind of CPU."""

    def __init__(self, flags: str, folder: Path):
        (folder / "product.cc").write_text(SOURCE)
        made = folder / "product.so"
        command = [library._compiler(), "-O1", "-std=c++17", "-fPIC", "-shared", "-pthread", "-w"]
        command += [*flags.split(), f"-I{library.SOURCES}"]
        subprocess.run([*command, str(folder / "product.cc"), "-o", str(made)], check=True)
        self._loaded = ctypes.CDLL(str(made))
        self.columns: int = self._loaded.panel_columns()

    def __call__(self, x, kernel, scales, first: int = 0, count: int = -1) -> np.ndarray:
        """Rows `first .. first + count` of the product, all by default."""
        rows, k = x.shape
        count = rows if count < 0 else count
        padded = -(-kernel.shape[1] // self.columns) * self.columns
        whole = np.zeros((-(-k // 4) * 4, padded), np.int16)
        whole[:k, : kernel.shape[1]] = kernel
        units = (whole + 128).astype(np.uint8).reshape(-1, 4, padded // self.columns, self.columns)
        panels = np.ascontiguousarray(units.transpose(2, 0, 3, 1))
        # Panels are prefetched beyond their end, and read as far as they go.
        factors = np.pad(scales, (0, padded - len(scales))).astype(np.float32)
        x, out = np.ascontiguousarray(x, np.float32), np.zeros((count, padded), np.float32)
        long, pointer = ctypes.c_long, ctypes.c_void_p
        self._loaded.product(
            pointer(x.ctypes.data),
            long(rows),
            long(k),
            pointer(panels.ctypes.data),
            pointer(factors.ctypes.data),
            long(padded),
            pointer(out.ctypes.data),
            long(first),
            long(count),
        )
        assert not np.nan_to_num(out[:, kernel.shape[1] :]).any()
        return out[:, : kernel.shape[1]]


@pytest.fixture(scope="module", params=SETS.values(), ids=SETS)
def product(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Products:
    return Products(request.param, tmp_path_factory.mktemp("int8"))


in_xla = jax.jit(rounded_matmul)


def weights(depth: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers, the largest there are among them, and scales that are powers of two."""
    rng = np.random.default_rng(seed)
    kernel = rng.integers(-127, 128, (depth, columns)).astype(np.int8)
    kernel[:, 0], kernel[:, 1] = 127, -127
    return kernel, np.exp2(rng.integers(-3, 4, columns)).astype(np.float32)


@pytest.mark.parametrize("depth", DEPTHS)
def test_whole_numbers_are_exact(product, depth):
    """Groups whose largest number is 127 are not rounded at all."""
    rng = np.random.default_rng(depth)
    x = rng.integers(-127, 128, (30, depth)).astype(np.float32)
    x[:, ::GROUP] = 127
    x[0], x[1] = 127, -127  # the largest sums
    kernel, scales = weights(depth, 70)
    expected = (x.astype(np.int64) @ kernel.astype(np.int64)) * scales.astype(np.float64)
    np.testing.assert_array_equal(product(x, kernel, scales), expected.astype(np.float32))
    np.testing.assert_array_equal(in_xla(x, kernel, scales), expected)


def test_any_numbers_are_those_of_the_definition(product):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((13, 577)) * np.exp(rng.standard_normal((13, 577)))).astype(np.float32)
    kernel, scales = weights(577, 40)
    expected = np.asarray(in_xla(x, kernel, scales))
    found = product(x, kernel, scales)
    far = np.abs(found - expected) > 1e-5 * np.abs(expected) + 1e-3
    # A number in the middle of two may be rounded to either: in few rows, and by one step.
    assert np.count_nonzero(far.any(axis=1)) <= 2
    step = np.abs(x).max() * scales.max()
    assert np.abs(found - expected).max() < step
    exact = x.astype(np.float64) @ (kernel * scales.astype(np.float64))
    error = np.linalg.norm(expected - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < 1e-2, error


def test_a_row_depends_on_no_other(product):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((29, 300)).astype(np.float32)
    kernel, scales = weights(300, 33)
    together = product(x, kernel, scales)
    for first, count in ((0, 1), (28, 1), (3, 7), (12, 13)):
        alone = product(x, kernel, scales, first, count)
        np.testing.assert_array_equal(alone, together[first : first + count])


def test_what_is_not_finite_shows_and_next_to_nothing_is_zero(product):
    x = np.ones((6, 300), np.float32)
    x[1, 299], x[2, 0], x[3, 140] = np.nan, np.inf, -np.inf
    x[4], x[5] = 0, 1e-38
    kernel, scales = weights(300, 3)
    for found in (product(x, kernel, scales), np.asarray(in_xla(x, kernel, scales))):
        assert np.isnan(found[1:4]).all()
        np.testing.assert_array_equal(found[4:], 0)
        np.testing.assert_allclose(found[0], kernel.sum(axis=0, dtype=np.int64) * scales, rtol=1e-6)


def test_a_number_far_from_the_others_costs_its_group_alone():
    x = np.full((1, 3 * GROUP), 0.01, np.float32)
    x[0, 5] = 1000.0
    whole, scale = jax.jit(rounded)(x)
    assert whole.shape == (1, 3, GROUP)
    assert int(whole[0, 0, 5]) == 127
    assert not np.asarray(whole)[0, 0, :5].any()
    np.testing.assert_array_equal(whole[0, 1:], 127)
    np.testing.assert_allclose(scale[0], [1000 / 127, 0.01 / 127, 0.01 / 127], rtol=1e-6)
