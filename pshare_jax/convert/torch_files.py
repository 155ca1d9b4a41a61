"""PyTorch's weight files (`pytorch_model.bin`), read without torch, and without running anything.

Such a file is a zip archive: a pickle that describes tensors, and the bytes of each storage. The
pickle is read by an unpickler that knows the few names which tensors need and refuses every other
(`torch.load(weights_only=True)` does the same).
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pshare_jax.convert.files import one_line
from pshare_jax.convert.tensors import DTYPES, LazyTensor
from pshare_jax.errors import CheckpointError

MAX_PICKLE_BYTES = 8 << 20
"""Of the description alone; those of published models have less than 1 MB."""

_OPERATIONS = frozenset(
    (
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "GLOBAL",
        "STACK_GLOBAL",
        "BINPERSID",
        "REDUCE",
        "BUILD",
        "MEMOIZE",
        "BINPUT",
        "LONG_BINPUT",
        "BINGET",
        "LONG_BINGET",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "EMPTY_LIST",
        "APPEND",
        "APPENDS",
        "EMPTY_DICT",
        "SETITEM",
        "SETITEMS",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "BINUNICODE",
        "SHORT_BINUNICODE",
    )
)
"""Of a pickle: what torch writes. Others may allocate what a file announces and does not have."""

_STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": DTYPES["bfloat16"],
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
}


class _Storage(NamedTuple):
    """Values of one type in the archive, by the name of their member."""

    dtype: np.dtype
    key: str
    length: int


class _Tensor(NamedTuple):
    """A view of a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor without a storage")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise pickle.UnpicklingError("a tensor of no shape")
    if 0 not in shape:
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        # A stride of 0 would make a large tensor of a small storage.
        if last >= storage.length or math.prod(shape) > storage.length:
            raise pickle.UnpicklingError("a tensor that reaches beyond its storage")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _table(*items: Any) -> dict[str, Any]:
    if items:
        raise pickle.UnpicklingError("a table that is made of something")
    return _Table()


class _Table(dict[str, Any]):
    """A state dict; torch gives it attributes, which say nothing."""


_KNOWN = {
    ("collections", "OrderedDict"): _table,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


def _check_operations(content: bytes) -> None:
    for operation, argument, _ in pickletools.genops(content):
        if operation.name not in _OPERATIONS:
            raise pickle.UnpicklingError(f"{operation.name} is no operation that torch writes")
        # A table of what has been made, which is as long as its largest number.
        numbered = argument if operation.name == "LONG_BINPUT" else 0
        if numbered is not None and int(numbered) > len(content):
            raise pickle.UnpicklingError("it numbers more objects than it has bytes")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (known := _KNOWN.get((module, name))) is None:
            raise pickle.UnpicklingError(f"{module}.{name} is nothing that a tensor needs")
        return known

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise pickle.UnpicklingError("a reference to no storage")
        _, dtype, key, _, count = pid
        if not (isinstance(dtype, np.dtype) and isinstance(key, str) and type(count) is int):
            raise pickle.UnpicklingError("a storage of an unknown type")
        return _Storage(dtype, key, count)


class TorchFile:
    """The tensors of one file.

    Raises:
        CheckpointError: no such archive, truncated or corrupt, or more than tensors.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._members = {entry.filename: entry for entry in archive.infolist()}
                (description,) = (n for n in self._members if n.endswith("/data.pkl"))
                if self._members[description].file_size > MAX_PICKLE_BYTES:
                    raise ValueError("its description is too large")
                order = description.removesuffix("data.pkl") + "byteorder"
                if order in self._members and archive.read(order) != b"little":
                    raise ValueError("its bytes are not in little-endian order")
                content = archive.read(description)
            _check_operations(content)
            found = _Unpickler(io.BytesIO(content)).load()
        # A damaged pickle can raise nearly anything.
        except Exception as error:
            raise CheckpointError(
                f"{path}: no file of tensors that torch (1.6 or later) has saved: {one_line(error)}"
            ) from error
        self._prefix = description.removesuffix("data.pkl") + "data/"
        if not isinstance(found, dict):
            raise CheckpointError(f"{path}: holds no table of tensors")
        self.tensors: dict[str, LazyTensor] = {}
        for name, tensor in found.items():
            if not isinstance(name, str) or not isinstance(tensor, _Tensor):
                raise CheckpointError(f"{path}: {str(name)[:80]!r} is no tensor")
            self.tensors[name] = self._lazy(name, tensor)

    def _lazy(self, name: str, tensor: _Tensor) -> LazyTensor:
        storage = tensor.storage
        entry = self._members.get(self._prefix + storage.key)
        size = storage.length * storage.dtype.itemsize
        if (
            entry is None
            or entry.compress_type != zipfile.ZIP_STORED
            or entry.file_size != size
            or entry.header_offset + size > self._path.stat().st_size
        ):
            raise CheckpointError(f"{self._path}: tensor {name}: its values are not in the file")
        kept = DTYPES["float32"] if storage.dtype == np.float16 else storage.dtype

        def read() -> np.ndarray:
            with self._path.open("rb") as file:
                file.seek(entry.header_offset)
                header = file.read(30)
                # A zip member's own header: 30 bytes, its name, and what else it has.
                names = int.from_bytes(header[26:28], "little")
                extra = int.from_bytes(header[28:30], "little")
                file.seek(names + extra, 1)
                values = np.fromfile(file, storage.dtype, storage.length)
            if values.size != storage.length:
                raise CheckpointError(f"{self._path}: tensor {name}: truncated")
            strides = [stride * storage.dtype.itemsize for stride in tensor.strides]
            view = np.lib.stride_tricks.as_strided(
                values[tensor.offset :], tensor.shape, strides, writeable=False
            )
            return np.ascontiguousarray(view).astype(kept, copy=False).reshape(tensor.shape)

        return LazyTensor(tensor.shape, kept, read)


@functools.lru_cache(maxsize=64)
def _opened(path: Path, modified: int) -> TorchFile:
    del modified
    return TorchFile(path)


def torch_tensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file that torch has saved; float16 becomes float32.

    Raises:
        CheckpointError: see `TorchFile`.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    return _opened(path, path.stat().st_mtime_ns).tensors
