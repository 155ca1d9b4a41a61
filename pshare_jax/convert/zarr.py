"""One tensor on disk: a Zarr 3 array as orbax stores it, with chunks made for sharded reading.

Each tensor is one file of inner chunks that lie along the axis on which tensor parallelism cuts it,
each with a CRC-32C: a device reads the byte ranges of its shard and no others, and a damaged file
is noticed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tensorstore as ts

from pshare_jax.convert.files import one_line
from pshare_jax.convert.tensors import STORED_DTYPES
from pshare_jax.errors import CheckpointError
from pshare_jax.models.weights import WeightSpec
from pshare_jax.sharding.rules import MESH_AXES, TENSOR

_OS_ERROR = re.compile(r"os_error_code='(\d+)'")

_CRC_BYTES = 4
_INDEX_ENTRY = struct.Struct("<QQ")
"""Where a chunk begins in the file, and its bytes with the CRC-32C that ends them."""

CHECKED = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
"""Codecs of each chunk, and of the index."""

MAX_CHUNKS = 16
"""Most chunks of one tensor: loading on up to this many devices reads each byte once."""


def chunk_shape(spec: WeightSpec) -> tuple[int, ...]:
    """Shape of a tensor's stored chunks: at most `MAX_CHUNKS`, along its tensor-parallel axis."""
    axis = next((i for i, name in enumerate(spec.axes) if TENSOR in MESH_AXES[name]), None)
    if axis is None:
        return spec.shape
    size = spec.shape[axis]
    chunks = max(n for n in range(1, MAX_CHUNKS + 1) if size % n == 0)
    return (*spec.shape[:axis], size // chunks, *spec.shape[axis + 1 :])


def _zarr_spec(path: Path, tensor: np.ndarray, chunk: Sequence[int]) -> dict[str, Any]:
    sharding = {"chunk_shape": chunk, "codecs": CHECKED, "index_codecs": CHECKED}
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        # All-zero chunks are stored too, so that a missing one is an error and not zeros.
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": tensor.shape,
            "data_type": tensor.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": tensor.shape}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
    }


def _finish(future: Any) -> Any:
    """The result of a tensorstore future, which is done when this returns or raises.

    After an interrupt it is waited for all the same: a write in flight would make anew the files
    that are being removed.
    """
    try:
        return future.result()
    except KeyboardInterrupt:
        future.exception()
        raise


def write_tensor(path: Path, array: np.ndarray, chunk: Sequence[int]) -> None:
    """Writes `array` as the Zarr array in the folder `path`; not yet flushed to disk.

    Raises:
        CheckpointError: it could not be written; the message has the system's reason.
    """
    # Whoever makes the checkpoint flushes all of it once.
    context = ts.Context({"file_io_sync": False})
    try:
        store = _finish(ts.open(_zarr_spec(path, array, chunk), create=True, context=context))
        _finish(store.write(array, can_reference_source_data_indefinitely=True))
    except ValueError as error:
        code = _OS_ERROR.search(str(error))
        reason = os.strerror(int(code[1])) if code else one_line(error)
        raise CheckpointError(f"tensor {path.name}: cannot be written: {reason}") from error


def seal(weights: Path, name: str, shape: tuple[int, ...], dtype: str) -> str:
    """SHA-256 (hex) of a stored tensor's metadata and of the checksums of its chunks.

    Differs when any value does, but reads a few bytes a chunk only.

    Raises:
        CheckpointError: a file is missing or of the wrong size, or the array has not that shape and
            dtype.
    """
    path = weights / name
    try:
        metadata = (path / "zarr.json").read_bytes()
        about = json.loads(metadata)
        stored = tuple(about["shape"]), about["data_type"]
        if stored != (shape, dtype):
            raise CheckpointError(
                f"{path}: is stored as {stored[1]} {list(stored[0])}, but was converted as {dtype} "
                f"{list(shape)}"
            )
        inner = about["codecs"][0]["configuration"]["chunk_shape"]
        count = math.prod(size // part for size, part in zip(shape, inner, strict=True))
        with path.joinpath("c", *["0"] * len(shape)).open("rb") as file:
            checksums = _checksums(file, count, math.prod(shape) * STORED_DTYPES[dtype].itemsize)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {one_line(error)}") from error
    except (LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: cannot be read: its zarr.json is malformed") from error
    return hashlib.sha256(metadata + checksums).hexdigest()


def _checksums(file: BinaryIO, count: int, nbytes: int) -> bytes:
    """The CRC-32C of each of `count` chunks, which ends it; where they lie, the file's end says."""
    expected = nbytes + count * (_CRC_BYTES + _INDEX_ENTRY.size) + _CRC_BYTES
    if (size := file.seek(0, os.SEEK_END)) != expected:
        raise ValueError(f"has {size} bytes instead of {expected}")
    file.seek(size - _CRC_BYTES - count * _INDEX_ENTRY.size)
    index = file.read(count * _INDEX_ENTRY.size)
    checksums = []
    for offset, length in _INDEX_ENTRY.iter_unpack(index):
        file.seek(min(offset + length, size) - _CRC_BYTES)
        checksums.append(file.read(_CRC_BYTES))
    return index + b"".join(checksums)


@functools.cache
def _one_at_a_time() -> ts.Context:
    return ts.Context({"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}})


class StoredTensor:
    """One tensor of a checkpoint, opened for reading.

    Tensorstore is used without orbax, which parses the metadata of all tensors for each one, does
    not say which tensor cannot be read, and leaves other reads in flight behind.

    Args:
        weights: the folder of a checkpoint's tensors.
        name: of this one.
        dtype: that it is cast to; None keeps the stored one.
        gentle: read by one thread at a time, since others have work to do.
    """

    def __init__(
        self, weights: Path, name: str, dtype: np.dtype | None = None, *, gentle: bool = False
    ):
        self._path = weights / name
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{self._path}/"},
            "fill_missing_data_reads": False,
        }
        with self._errors():
            context = _one_at_a_time() if gentle else None
            store = ts.open(spec, open=True, read=True, context=context).result()
        self.shape = tuple(store.shape)
        self.stored_dtype = store.dtype.name
        self._store = store if dtype is None else ts.cast(store, dtype)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise CheckpointError(f"{self._path}: cannot be read: {one_line(error)}") from error

    def read(self, index: tuple[slice, ...] = ()) -> Callable[[], np.ndarray]:
        """Starts reading a part, by default all; the result waits for it."""
        future = self._store[index].read()

        def result() -> np.ndarray:
            with self._errors():
                return future.result()

        return result
