"""Products of weights of 8 bits with rows that keep their dtype, on every kind of CPU."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pshare_jax.kernels.native import library

SOURCE = Path(__file__).with_name("weight_only.cc")
X86 = {
    "this CPU": "-march=native",
    "the twin of a matrix unit": "-march=native -DPSHARE_TILES_TWIN",
    "AVX2": "-march=x86-64-v3",
    "SSE2": "-march=x86-64",
}
SETS = X86 if platform.machine() == "x86_64" else {"this CPU": "-mcpu=native"}
TWIN = 2
"""What a library that is compiled for the twin answers when it is started."""
DTYPES = ["float32", "bfloat16"]
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BYTES = {
    "int8": np.arange(256, dtype=np.uint8).view(np.int8),
    "fp8": np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF]).view(FP8),
}
"""Every weight that there is: all bytes, but for those of NaN."""


class Products:
    """`x [rows, K]` times `kernel [K, N]` of 8 bits with `scales [N]`, compiled for one CPU."""

    def __init__(self, flags: str, folder: Path):
        made = folder / "product.so"
        # One of them as users have it; the others compile in half the time.
        level = "-O3" if flags == X86["SSE2"] else "-O0"
        command = [library._compiler(), level, "-std=c++17", "-fPIC", "-shared", "-pthread", "-w"]
        command += [*flags.split(), f"-I{library.SOURCES}", str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, timeout=300)
        self._loaded = ctypes.CDLL(str(made))
        self.columns: int = self._loaded.panel_columns()
        assert (self._loaded.start() == TWIN) == ("TWIN" in flags)

    def __call__(
        self, dtype: str, x: np.ndarray, kernel: np.ndarray, scales: np.ndarray, wide: bool = False
    ) -> np.ndarray:
        """The product; `wide`: by a panel of the weights in the dtype, and then the scales."""
        rows, k = x.shape
        padded = -(-kernel.shape[1] // self.columns) * self.columns
        stored = np.zeros((-(-k // 4) * 4, padded), np.uint8)
        stored[:k, : kernel.shape[1]] = kernel.view(np.uint8)
        # Whole numbers are stored plus 128.
        stored ^= np.uint8(0x80 if kernel.dtype == np.int8 else 0)
        units = stored.reshape(-1, 4, padded // self.columns, self.columns)
        panels = np.ascontiguousarray(units.transpose(2, 0, 3, 1))
        factors = np.pad(scales, (0, padded - len(scales))).astype(np.float32)
        x, out = np.ascontiguousarray(x, np.float32), np.full((rows, padded), np.nan, np.float32)
        long, pointer = ctypes.c_long, ctypes.c_void_p
        self._loaded.product(
            dtype == "bfloat16",
            kernel.dtype == FP8,
            pointer(x.ctypes.data),
            long(rows),
            long(k),
            pointer(panels.ctypes.data),
            pointer(factors.ctypes.data),
            long(padded),
            pointer(out.ctypes.data),
            wide,
        )
        return out[:, : kernel.shape[1]]


@pytest.fixture(scope="module", params=SETS.values(), ids=SETS)
def product(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Products:
    return Products(request.param, tmp_path_factory.mktemp("weight-only"))


def weights(form: str, depth: int, columns: int, *, small: bool = False) -> tuple[np.ndarray, ...]:
    """Of all weights that there are, and scales that are powers of two.

    `small`: such that every sum with whole numbers up to 40 is exact in float32, in any order, for
    up to 1538 of them: whole numbers of some unit, up to 256 of it.
    """
    rng = np.random.default_rng(depth)
    all_ = BYTES[form]
    if small and form == "fp8":
        all_ = all_[np.abs(all_.astype(np.float32)) <= 0.5]
    kernel = all_[rng.integers(0, len(all_), (depth, columns))]
    wide = all_.astype(np.float32)
    kernel[:, 0], kernel[:, 1] = all_[wide.argmax()], all_[wide.argmin()]
    return kernel, np.exp2(rng.integers(-3, 4, columns)).astype(np.float32)


def numbers(rows: int, depth: int) -> np.ndarray:
    """Of very different sizes, and of both dtypes."""
    rng = np.random.default_rng(rows + depth)
    x = rng.standard_normal((rows, depth)) * np.exp(2 * rng.standard_normal((rows, depth)))
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.mark.parametrize("form", BYTES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_is_the_number_that_it_stands_for(product, dtype, form):
    """In each place of a unit, widened in registers or before."""
    kernel = np.broadcast_to(BYTES[form], (4, len(BYTES[form])))
    expected = BYTES[form].astype(np.float32)
    assert np.isfinite(expected).all()
    for rows in (4, 20):
        x = np.tile(np.eye(4, dtype=np.float32), (rows // 4, 1))
        found = product(dtype, x, kernel, np.ones(kernel.shape[1]))
        np.testing.assert_array_equal(found, np.tile(expected, (rows, 1)))


@pytest.mark.parametrize("form", BYTES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [1, 2, 5, 128, 257, 1538])
def test_sums_of_whole_numbers_are_exact(product, depth, dtype, form):
    """Every sum is below 2^24 units, which float32 holds in any order."""
    x = np.random.default_rng(depth).integers(-40, 41, (30, depth)).astype(np.float32)
    x[0], x[1] = 40, -40
    kernel, scales = weights(form, depth, 70, small=True)
    expected = (x.astype(np.float64) @ kernel.astype(np.float64)) * scales.astype(np.float64)
    found = product(dtype, x, kernel, scales)
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    np.testing.assert_array_equal(product(dtype, x[:3], kernel, scales), found[:3])


@pytest.mark.parametrize("form", BYTES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_those_of_products_with_wide_weights(product, dtype, form):
    """However many rows there are: they are widened in registers, or before."""
    kernel, scales = weights(form, 603, 40)
    for rows in (1, 7, 12, 13, 33):
        x = numbers(rows, 603)
        found = product(dtype, x, kernel, scales)
        np.testing.assert_array_equal(found, product(dtype, x, kernel, scales, wide=True))
        exact = x.astype(np.float64) @ (kernel.astype(np.float64) * scales.astype(np.float64))
        assert np.linalg.norm(found - exact) < 1e-6 * np.linalg.norm(exact)


@pytest.mark.parametrize("form", BYTES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_no_other(product, dtype, form):
    kernel, scales = weights(form, 302, 33)
    x = numbers(40, 302)
    together = product(dtype, x, kernel, scales)
    for first, count in ((0, 1), (39, 1), (3, 7), (5, 12), (12, 13), (7, 33)):
        alone = product(dtype, x[first : first + count], kernel, scales)
        np.testing.assert_array_equal(alone, together[first : first + count])


@pytest.mark.parametrize("form", BYTES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row(product, dtype, form):
    kernel, scales = weights(form, 301, 5)
    for rows in (5, 20):
        x = numbers(rows, 301)
        clean = product(dtype, x, kernel, scales)
        x[1, 300], x[3, 7] = np.nan, np.inf
        found = product(dtype, x, kernel, scales)
        assert not np.isfinite(found[[1, 3]]).any()
        others = np.delete(np.arange(rows), [1, 3])
        np.testing.assert_array_equal(found[others], clean[others])
