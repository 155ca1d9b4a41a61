"""Products by the tiles of a matrix unit: its twin against the manual, the unit's code against it.

The instructions are emulated, so that all of this runs on CPUs without that unit too.
"""

from __future__ import annotations

import ctypes
import platform
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pshare_jax.kernels.native import library

FOLDER = Path(__file__).parent
FLAGS = ("-O1", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread", "-w")
TWIN = "-DPSHARE_TILES_TWIN"
LEAST = Fraction(2) ** -126
COLUMNS = 32


def compiled(folder: Path, source: Path, sources: Path = library.SOURCES) -> ctypes.CDLL:
    made = folder / f"{source.stem}.so"
    includes = [f"-I{sources}", f"-I{FOLDER}"]
    command = [library._compiler(), *FLAGS, TWIN, *includes, str(source), "-o", str(made)]
    subprocess.run(command, check=True, timeout=300)
    return ctypes.CDLL(str(made))


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = compiled(tmp_path_factory.mktemp("tiles"), FOLDER / "tiles.cc")
    pointer, long = ctypes.c_void_p, ctypes.c_long
    loaded.amx_agrees.restype = long
    loaded.panel.argtypes = [long, pointer, long, pointer, long, pointer, ctypes.c_int]
    loaded.fused_step.argtypes = [ctypes.c_float] * 3
    loaded.fused_step.restype = ctypes.c_float
    loaded.powers.argtypes = [ctypes.c_int, pointer, pointer, long]
    return loaded


def rounded(exact: Fraction) -> np.float32:
    """To 24 bits, halfway cases to even; zero if that is below the least normal number."""
    if exact == 0:
        return np.float32(0)
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    step = Fraction(2) ** (exponent - 23)
    found = round(size / step) * step
    sign = -1.0 if exact < 0 else 1.0
    if found < LEAST:
        return np.float32(sign * 0.0)
    if found >= Fraction(2) ** 128:
        return np.float32(sign * np.inf)
    return np.float32(sign * float(found))


def operand(x: Any) -> Fraction:
    return Fraction(float(x)) if abs(float(x)) >= LEAST else Fraction(0)


def by_the_manual(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """TDPBF16PS of the software developer's manual, finite numbers only, 16 units at a time.

    Args:
        a: [M, 2 U] bfloat16; b: [U, N, 2] bfloat16; c: [M, N] float32.
    """
    out = c.copy()
    for m, n in np.ndindex(*c.shape):
        for first in range(0, b.shape[0], 16):
            sums = [np.float32(0), np.float32(0)]
            for unit in range(first, min(first + 16, b.shape[0])):
                for i in (0, 1):
                    product = operand(a[m, 2 * unit + i]) * operand(b[unit, n, i])
                    sums[i] = rounded(product + operand(sums[i]))
            both = rounded(operand(sums[0]) + operand(sums[1]))
            out[m, n] = rounded(operand(out[m, n]) + operand(both))
    return out


def multiplied(tiles: ctypes.CDLL, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    a, b, out = np.ascontiguousarray(a), np.ascontiguousarray(b), c.copy()
    pointers = a.ctypes.data, a.shape[1], b.ctypes.data, b.shape[0], out.ctypes.data
    tiles.panel(a.shape[0], *pointers, 1)
    return out


def operands(seed: int, rows: int, units: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """With denormals, and products that are."""
    rng = np.random.default_rng(seed)

    def numbers(*shape: int) -> np.ndarray:
        exponents = rng.choice(
            [-130.0, -64, -63, -9, -3, 0, 4], shape, p=[0.1, 0.1, 0.1, *[0.175] * 4]
        )
        wide = (rng.standard_normal(shape) * 2.0**exponents).astype(np.float32)
        return wide.astype(ml_dtypes.bfloat16)

    c = numbers(rows, COLUMNS).astype(np.float32)
    return numbers(rows, 2 * units), numbers(units, COLUMNS, 2), c


def test_the_twin_is_what_the_manual_says(tiles):
    for seed, (rows, units) in enumerate([(1, 1), (3, 5), (2, 16), (1, 37)]):
        a, b, c = operands(seed, rows, units)
        wide = a.astype(np.float32), b.astype(np.float32)
        expected = by_the_manual(*wide, c)
        np.testing.assert_array_equal(
            multiplied(tiles, a, b, c).view(np.int32) & 0x7FFFFFFF,  # of zeros any sign
            expected.view(np.int32) & 0x7FFFFFFF,
        )


@pytest.mark.parametrize(
    ("a", "b", "c", "expected"),
    [
        (2.0**-64, 2.0**-62, 0.0, 2.0**-126),
        (2.0**-64, 2.0**-63, 0.0, 0.0),
        (-(2.0**-64), 2.0**-63, 0.0, -0.0),
        # As a denormal this would round to the least normal number; with 24 bits it is below that.
        (-(2.0**-75), 2.0**-75, 2.0**-126, 0.0),
        (-(2.0**-76), 2.0**-75, 2.0**-126, 2.0**-126),
        (np.inf, 1.0, -1.0, np.inf),
        (np.inf, 0.0, 1.0, np.nan),
        (2.0**100, 2.0**100, 0.0, np.inf),
        (1.0, 1.0, np.nan, np.nan),
    ],
)
def test_single_steps(tiles, a, b, c, expected):
    found = np.float32(tiles.fused_step(a, b, c))
    np.testing.assert_equal(found, np.float32(expected))
    assert np.isnan(expected) or np.signbit(found) == np.signbit(np.float32(expected))


def test_nan_and_infinity_stay_in_their_row(tiles):
    a, b, c = operands(7, 20, 40)
    clean = multiplied(tiles, a, b, c)
    a[3, 5], a[18, 70] = np.nan, np.inf
    found = multiplied(tiles, a, b, c)
    assert np.isnan(found[3]).all()
    assert not np.isfinite(found[18]).any()
    others = np.delete(np.arange(20), [3, 18])
    np.testing.assert_array_equal(found[others], clean[others])


def test_a_row_depends_on_no_other(tiles):
    a, b, c = operands(8, 70, 300)
    together = multiplied(tiles, a, b, c)
    for row in (0, 15, 16, 31, 32, 69):
        one = slice(row, row + 1)
        np.testing.assert_array_equal(multiplied(tiles, a[one], b, c[one])[0], together[row])
    for first, last in ((0, 17), (10, 43), (33, 70)):
        some = slice(first, last)
        np.testing.assert_array_equal(multiplied(tiles, a[some], b, c[some]), together[some])


def test_nothing_behind_the_last_unit_counts(tiles):
    """What follows a panel is another one, of anything."""
    a, b, c = operands(9, 5, 21)
    expected = multiplied(tiles, a, b, c)
    longer = np.concatenate([b, np.full((16, COLUMNS, 2), np.nan, b.dtype)])
    out = c.copy()
    pointers = a.ctypes.data, a.shape[1], longer.ctypes.data, 21, out.ctypes.data
    tiles.panel(5, *pointers, 1)
    np.testing.assert_array_equal(out, expected)


def test_the_code_of_the_unit_gives_the_bits_of_its_twin(tiles):
    """As it is compiled: what its instructions say is done, one by one, by an emulator."""
    instructions = tiles.amx_agrees()
    assert instructions > 1000 if platform.machine() == "x86_64" else instructions == -1


def test_what_sums_otherwise_is_found_out(tiles):
    assert tiles.twins_agree() == 1
    assert tiles.backwards_agrees() == 0
    assert tiles.denormals_agree() == 0


EVERYTHING = """
#include "attention.h"
#include "matmul.h"
#include "tile_check.h"
template class pshare::Attention<pshare::bf16, pshare::bf16>;
template void pshare::matmul<float>(const pshare::Pair&, const pshare::Pair*, float*);
pshare::Multiplier start(bool wanted) { return pshare::start_tiles(wanted); }
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86-64")
def test_it_compiles_for_a_cpu_that_has_the_unit(tmp_path):
    source, out = tmp_path / "all.cc", tmp_path / "all.s"
    source.write_text(EVERYTHING)
    flags = ["-O0", "-march=sapphirerapids", "-std=c++17", "-S", "-w", f"-I{library.SOURCES}"]
    command = [library._compiler(), *flags, str(source), "-o", str(out)]
    subprocess.run(command, check=True, timeout=300)
    assembly = out.read_text().split()
    for instruction in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
        assert instruction in assembly


BROKEN = """struct Broken : Twin<9> {
  template <int sum, int left, int right>
  static void dot() {
    Twin<9>::dot<sum, left, right>();
    if (at(left).rows == 7) at(sum).lines[6][15] ^= 1;  // one bit, of one shape
  }
};
using Tiles = Broken;"""
USING = """
#include "tile_check.h"
extern "C" int start(int wanted) { return static_cast<int>(pshare::start_tiles(wanted)); }
extern "C" int in_use() { return pshare::has_tiles(); }
"""


def test_a_unit_that_errs_by_a_bit_is_not_used(tmp_path):
    sources = tmp_path / "src"
    sources.mkdir()
    for file in library.SOURCES.iterdir():
        text = file.read_text()
        if file.name == "tile_gemm.h":
            assert "using Tiles = TwinTiles;" in text
            text = text.replace("using Tiles = TwinTiles;", BROKEN)
        (sources / file.name).write_text(text)
    (tmp_path / "using.cc").write_text(USING)
    broken = compiled(tmp_path, tmp_path / "using.cc", sources)
    assert (broken.start(1), broken.in_use()) == (-3, 0)


def test_a_unit_that_is_not_wanted_is_not_used(tiles):
    assert (tiles.start(0), tiles.in_use()) == (-1, 0)
    assert (tiles.start(1), tiles.in_use()) == (2, 1)


def test_registers_are_released_when_a_call_ends(tiles):
    """Whatever else runs in the caller's thread may shape them in its own way."""
    tiles.start(1)
    assert tiles.shaped_while_and_after_a_call() == 0b01


@pytest.mark.parametrize("base_two", [0, 1])
def test_powers(tiles, base_two):
    least = -126.0 if base_two else -87.3
    x = np.linspace(least, 0, 1 << 16, dtype=np.float32)
    special = [
        0.0,
        least,
        np.nextafter(np.float32(least), np.float32(-200)),
        -1e30,
        -np.inf,
        np.nan,
    ]
    x[: len(special)] = special
    y = np.empty_like(x)
    tiles.powers(base_two, x.ctypes.data, y.ctypes.data, x.size)
    assert y[0] == 1
    assert y[1] > 0
    assert (y[2:5] == 0).all()
    assert np.isnan(y[5])
    rest = x[len(special) :].astype(np.float64)
    exact = np.exp2(rest) if base_two else np.exp(rest)
    np.testing.assert_allclose(y[len(special) :], exact, rtol=2.5e-7)
