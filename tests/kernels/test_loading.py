"""Weights from files into panels, in C++: the layout by its definition, and every checksum."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pshare_jax.convert.tensors import STORED_DTYPES as DTYPES
from pshare_jax.convert.zarr import StoredTensor, write_tensor
from pshare_jax.kernels.native.library import require_library
from pshare_jax.kernels.native.loading import (
    BESIDE_OTHERS,
    aligned,
    pack_into,
    packed_dtype,
    packed_size,
    read_tensor,
)


@functools.cache
def columns() -> int:
    return require_library().panel_columns


BITS = {"float32": np.uint32, "bfloat16": np.uint16, "int8": np.uint8, "float8_e4m3fn": np.uint8}


def matrix(rng: np.random.Generator, dtype: str, k: int, n: int) -> np.ndarray:
    factor = 50 if dtype == "int8" else 1
    return (factor * rng.standard_normal((k, n), np.float32)).astype(DTYPES[dtype])


def by_definition(matrices: list[np.ndarray], interleave: bool) -> np.ndarray:
    """`[panels, K / unit, columns, unit]`, flattened: what the products read."""
    unit = 4 // matrices[0].itemsize
    packed = []
    for m in matrices:
        k, n = m.shape
        padded = np.zeros((-(-k // unit) * unit, -(-n // columns()) * columns()), m.dtype)
        padded[:k, :n] = m
        split = padded.reshape(-1, unit, padded.shape[1] // columns(), columns())
        packed.append(split.transpose(2, 0, 3, 1))
    whole = np.stack(packed, axis=1) if interleave else np.concatenate(packed)
    # Whole numbers are written plus 128.
    return (whole.view(np.uint8) + 128 if whole.dtype == np.int8 else whole).reshape(-1)


@pytest.mark.parametrize("nice", [0, BESIDE_OTHERS])
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("dtype", BITS)
def test_panels_are_what_they_are_by_definition(dtype: str, interleave: bool, nice: int) -> None:
    rng = np.random.default_rng(0)
    for k, n in itertools.product((1, 2, 7, 64), (1, columns() - 1, columns(), 3 * columns() + 5)):
        widths = (n, n) if interleave else (n, 1, 2 * columns())
        matrices = [matrix(rng, dtype, k, width) for width in widths]
        # Columns that lie together, as those of a tied head do, and rows with gaps between.
        matrices[0] = np.ascontiguousarray(matrices[0].T).T
        matrices[1] = np.repeat(matrices[1], 2, axis=0)[::2]
        size, made = packed_size(require_library(), matrices), packed_dtype(DTYPES[dtype])
        out = np.full(size, 7, made)
        pack_into(require_library(), matrices, out, interleave=interleave, nice=nice)
        expected = by_definition(matrices, interleave)
        np.testing.assert_array_equal(out.view(BITS[dtype]), expected.view(BITS[dtype]))


def test_what_does_not_fit_is_refused() -> None:
    library = require_library()
    one = np.zeros((4, 3), np.float32)
    with pytest.raises(ValueError, match="do not fit"):
        pack_into(library, [one], np.zeros(3, np.float32))
    pair = [one, np.zeros((4, columns() + 1), np.float32)]
    out = np.zeros(packed_size(library, pair), np.float32)
    with pytest.raises(ValueError, match="one shape"):
        pack_into(library, pair, out, interleave=True)


def test_memory_begins_where_it_is_to() -> None:
    for alignment in (64, 1 << 21):
        array = aligned((3, 5), ml_dtypes.bfloat16, alignment)
        assert (array.shape, array.dtype) == ((3, 5), ml_dtypes.bfloat16)
        assert array.ctypes.data % alignment == 0
        assert array.flags.c_contiguous


def special(dtype: str, count: int) -> np.ndarray:
    """Numbers of all kinds, those that rounding is hard for and NaNs among them, by their bits."""
    bits = np.random.default_rng(1).integers(0, 1 << 32, count, np.uint32)
    hard = [0, 1, 0x8000, 0x18000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00001, 0xFFFFFFFF]
    bits[: len(hard)] = hard
    if dtype == "bfloat16":
        bits = (bits >> 16).astype(np.uint16)
    return bits.view(DTYPES[dtype])


LAYOUTS = [((24,), (24,)), ((6, 64), (6, 4)), ((64, 6), (8, 6)), ((5, 8, 7), (5, 2, 7))]


@pytest.mark.parametrize("wanted", ["bfloat16", "float32"])
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_tensors_are_read_as_tensorstore_reads_them(
    tmp_path: Path, stored: str, wanted: str
) -> None:
    for number, (shape, chunk) in enumerate([*LAYOUTS, ((1 << 18, 3), (1 << 17, 3))]):
        array = special(stored, int(np.prod(shape))).reshape(shape)
        write_tensor(tmp_path / str(number), array, chunk)
        expected = StoredTensor(tmp_path, str(number), DTYPES[wanted]).read()()
        out = aligned(shape, DTYPES[wanted])
        assert read(tmp_path / str(number), shape, chunk, stored, out)
        np.testing.assert_array_equal(out.view(BITS[wanted]), expected.view(BITS[wanted]))


def read(folder: Path, shape, chunk, stored: str, out: np.ndarray, nice: int = 0) -> bool:
    axis = next((i for i, (n, part) in enumerate(zip(shape, chunk, strict=True)) if n != part), 0)
    layout = (
        int(np.prod(shape[:axis])), shape[axis] // chunk[axis], int(np.prod(chunk[axis:])),
    )  # fmt: skip
    path = folder.joinpath("c", *["0"] * len(shape))
    return read_tensor(require_library(), path, layout, DTYPES[stored], out, nice)


def test_no_flipped_byte_is_read(tmp_path: Path) -> None:
    shape, chunk = (4, 6), (4, 2)
    write_tensor(tmp_path / "t", special("float32", 24).reshape(shape), chunk)
    file = tmp_path / "t" / "c" / "0" / "0"
    whole = file.read_bytes()
    out = aligned(shape, np.float32)
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert not read(tmp_path / "t", shape, chunk, "float32", out), at
    for other in (whole[:-1], whole + b"\0", b""):
        file.write_bytes(other)
        assert not read(tmp_path / "t", shape, chunk, "float32", out, BESIDE_OTHERS)
    file.unlink()
    assert not read(tmp_path / "t", shape, chunk, "float32", out)
    file.write_bytes(whole)
    assert read(tmp_path / "t", shape, chunk, "float32", out, BESIDE_OTHERS)
