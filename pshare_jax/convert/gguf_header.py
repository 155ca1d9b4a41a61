"""The header of a GGUF file: metadata and where each tensor lies.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count and length in the
file is checked against the bytes that are left before anything is allocated for it, which the
reader of the `gguf` package does not do: 100 bytes may announce an array of 2^40 elements.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QuantizationType

from pshare_jax.convert.files import one_line
from pshare_jax.errors import CheckpointError

VERSIONS = (2, 3)
MAX_ELEMENTS = 1 << 22
"""Array elements of a whole header; 262,144 tokens with their merges make 1.3 million."""

MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 20

_SCALARS = {
    gguf.GGUFValueType.UINT8: "<u1",
    gguf.GGUFValueType.INT8: "<i1",
    gguf.GGUFValueType.UINT16: "<u2",
    gguf.GGUFValueType.INT16: "<i2",
    gguf.GGUFValueType.UINT32: "<u4",
    gguf.GGUFValueType.INT32: "<i4",
    gguf.GGUFValueType.FLOAT32: "<f4",
    gguf.GGUFValueType.BOOL: "?",
    gguf.GGUFValueType.UINT64: "<u8",
    gguf.GGUFValueType.INT64: "<i8",
    gguf.GGUFValueType.FLOAT64: "<f8",
}
_LENGTH_BYTES = 8
_MIN_ENTRY_BYTES = _LENGTH_BYTES + 4 + 1
_MIN_TENSOR_BYTES = _LENGTH_BYTES + 4 + 4 + 8


class TensorInfo(NamedTuple):
    """Where a tensor lies in the file; `shape` is rows first, as numpy has it."""

    shape: tuple[int, ...]
    type: QuantizationType
    nbytes: int
    offset: int


class Header(NamedTuple):
    """Metadata as Python values (arrays as lists) and the tensors, both by name."""

    fields: dict[str, Any]
    tensors: dict[str, TensorInfo]


class _MalformedError(Exception):
    """The header contradicts the format or the file's size."""


class _Cursor:
    """Reads on from where it stands, never more than the file holds."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.size = os.fstat(file.fileno()).st_size
        self.position = 0
        self.elements = 0

    def check(self, count: int, item_bytes: int, what: str) -> None:
        """Raises when `count` items of at least `item_bytes` each cannot follow."""
        left = self.size - self.position
        if count * item_bytes > left:
            raise _MalformedError(f"{what} counts {count}, but {left} bytes are left in the file")

    def take(self, count: int, what: str) -> bytes:
        self.check(count, 1, what)
        data = self._file.read(count)
        if len(data) != count:
            raise _MalformedError(f"{what} is cut off")
        self.position += count
        return data

    def integer(self, form: str, what: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def text(self, what: str) -> str:
        data = self.take(self.integer("<Q", what), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise _MalformedError(f"{what} is not UTF-8") from error


def read_header(path: Path) -> Header:
    """Reads the header of the GGUF file `path`; no tensor is read.

    Raises:
        CheckpointError: no GGUF file, one that is truncated or corrupt, of another version or byte
            order, or with a type of quantisation that the `gguf` package does not know.
    """
    try:
        with path.open("rb") as file:
            cursor = _Cursor(file)
            tensor_count, entry_count = _counts(path, cursor)
            fields: dict[str, Any] = {}
            for _ in range(entry_count):
                name = cursor.text("a metadata key")
                if name in fields:
                    raise _MalformedError(f"metadata {name} is there twice")
                fields[name] = _value(cursor, f"metadata {name}")
            raw = [_tensor(cursor) for _ in range(tensor_count)]
            return Header(fields, _placed(path, cursor, fields, raw))
    except (_MalformedError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a GGUF file, or truncated or corrupt: {one_line(error)}"
        ) from error


def _counts(path: Path, cursor: _Cursor) -> tuple[int, int]:
    if cursor.take(4, "the magic number") != b"GGUF":
        raise _MalformedError("it does not start with GGUF")
    version = cursor.integer("<I", "the version")
    if version & 0xFFFF == 0 and version:
        raise CheckpointError(f"{path}: is big-endian; convert it to little-endian first")
    if version not in VERSIONS:
        raise _MalformedError(f"version {version} is not one of {', '.join(map(str, VERSIONS))}")
    tensor_count = cursor.integer("<Q", "the number of tensors")
    entry_count = cursor.integer("<Q", "the number of metadata entries")
    cursor.check(entry_count, _MIN_ENTRY_BYTES, "the metadata")
    cursor.check(tensor_count, _MIN_TENSOR_BYTES, "the table of tensors")
    return tensor_count, entry_count


def _type(cursor: _Cursor, what: str) -> gguf.GGUFValueType:
    number = cursor.integer("<I", what)
    try:
        return gguf.GGUFValueType(number)
    except ValueError as error:
        raise _MalformedError(f"{what} is of an unknown type {number}") from error


def _value(cursor: _Cursor, what: str) -> Any:
    kind = _type(cursor, what)
    if kind != gguf.GGUFValueType.ARRAY:
        return _items(cursor, kind, 1, what)[0]
    kind = _type(cursor, what)
    count = cursor.integer("<Q", what)
    cursor.elements += count
    if cursor.elements > MAX_ELEMENTS:
        raise _MalformedError(f"{what} makes more than {MAX_ELEMENTS} array elements in all")
    return _items(cursor, kind, count, what)


def _items(cursor: _Cursor, kind: gguf.GGUFValueType, count: int, what: str) -> list[Any]:
    if kind == gguf.GGUFValueType.STRING:
        cursor.check(count, _LENGTH_BYTES, what)
        return [cursor.text(what) for _ in range(count)]
    if kind not in _SCALARS:
        raise _MalformedError(f"{what} is an array of arrays")
    dtype = np.dtype(_SCALARS[kind])
    cursor.check(count, dtype.itemsize, what)
    return np.frombuffer(cursor.take(count * dtype.itemsize, what), dtype).tolist()


class _RawTensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


def _tensor(cursor: _Cursor) -> _RawTensor:
    name = cursor.text("a tensor's name")
    dims = cursor.integer("<I", f"tensor {name}")
    if not 1 <= dims <= MAX_DIMS:
        raise _MalformedError(f"tensor {name} has {dims} dimensions")
    data = cursor.take(8 * dims, f"tensor {name}")
    shape = tuple(reversed(struct.unpack(f"<{dims}Q", data)))
    kind = cursor.integer("<I", f"tensor {name}")
    return _RawTensor(name, shape, kind, cursor.integer("<Q", f"tensor {name}"))


def _placed(
    path: Path, cursor: _Cursor, fields: dict[str, Any], raw: list[_RawTensor]
) -> dict[str, TensorInfo]:
    """The tensors with their absolute offsets; each must lie within the file."""
    alignment = fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    valid = isinstance(alignment, int) and 0 < alignment <= MAX_ALIGNMENT
    if not valid or alignment & (alignment - 1):
        raise _MalformedError(f"metadata general.alignment is {alignment!r}, not a power of two")
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, number, offset in raw:
        if name in tensors:
            raise _MalformedError(f"tensor {name} is there twice")
        kind = _quantisation(path, name, number)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block or 0 in shape:
            raise _MalformedError(
                f"tensor {name}: shape {list(shape)} is not in whole blocks of {block}"
            )
        nbytes = math.prod(shape) // block * block_bytes
        if (end := start + offset + nbytes) > cursor.size:
            raise _MalformedError(
                f"tensor {name}: truncated: ends at byte {end}, file has {cursor.size}"
            )
        tensors[name] = TensorInfo(shape, kind, nbytes, start + offset)
    return tensors


def _quantisation(path: Path, name: str, number: int) -> QuantizationType:
    try:
        return QuantizationType(number)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: tensor {name}: the installed `gguf` package knows no type of quantisation "
            f"with number {number}; upgrade the package, or quantise the model to another type"
        ) from error
