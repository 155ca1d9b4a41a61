"""Hugging Face model folders: reading safetensors and torch's files, writing safetensors."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from pshare_jax.convert.eight_bits import native_eight_bits
from pshare_jax.convert.files import one_line
from pshare_jax.convert.hf_tokenizer import CONFIG_FILE, PATTERNS
from pshare_jax.convert.manifest import read_json
from pshare_jax.convert.names import (
    hf_sources,
    hf_tensors,
    is_redundant,
    read_native,
)
from pshare_jax.convert.progress import Report, quiet
from pshare_jax.convert.quantised import eight_bit_weights, plain_tensors
from pshare_jax.convert.schemes import Scheme
from pshare_jax.convert.tensors import DTYPES, FP8, LazyTensor
from pshare_jax.convert.torch_files import torch_tensors
from pshare_jax.errors import CheckpointError, printable
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.registry import family
from pshare_jax.models.text_part import text_names
from pshare_jax.models.weights import weight_specs

logger = logging.getLogger(__name__)

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
HUB_PATTERNS = (CONFIG_FILE, "*.safetensors", INDEX_FILE, *PATTERNS)

_READ_AS = {"F32": "float32", "BF16": "bfloat16", "F16": "float32"}
"""Safetensors dtype -> the smallest of ours that holds its every value."""

_RAW = {
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "F8_E4M3": FP8,
}
"""What parts of quantised weights are stored as; see `quantised`."""

_STORED_AS = {"float32": "F32", "bfloat16": "BF16"}

COMPARED_ELEMENTS = 1 << 22
"""Of two tensors compared at once."""

SHARD_BYTES = 4 << 30
"""Exported files are cut at about this size."""


def weights_in(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a model by Hugging Face name: safetensors, or what torch saved.

    Raises:
        CheckpointError: as `files_in`.
    """
    torch_files = (folder / TORCH_FILE, folder / f"{TORCH_FILE}.index.json")
    ours = (folder / WEIGHTS_FILE, folder / INDEX_FILE)
    if any(path.is_file() for path in torch_files) and not any(path.is_file() for path in ours):
        return files_in(folder, TORCH_FILE)
    return files_in(folder, WEIGHTS_FILE)


def files_in(folder: Path, weights: str) -> dict[str, Path]:
    """The file of each tensor by Hugging Face name, from `weights` or its index.

    Raises:
        CheckpointError: no weights, a malformed index, or a file that is missing, truncated or
            corrupt.
    """
    index_path = folder / f"{weights}.index.json"
    if not index_path.is_file():
        path = folder / weights
        if not path.is_file():
            raise CheckpointError(
                f"{path}: no such file (safetensors can be read, and {TORCH_FILE} of models)"
            )
        return dict.fromkeys(_names_in(path), path)
    index = read_json(index_path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(v, str) for v in index.values()):
        raise CheckpointError(f"{index_path}: has no valid weight_map")
    for name in index.values():
        if not name or Path(name).name != name:
            raise CheckpointError(f"{index_path}: {name!r} is not a file beside it")
    held = {name: set(_names_in(folder / name)) for name in sorted(set(index.values()))}
    for tensor, name in index.items():
        if tensor not in held[name]:
            raise CheckpointError(f"{folder / name}: tensor {tensor} is missing")
    for name, tensors in held.items():
        if unlisted := sorted(tensor for tensor in tensors if index.get(tensor) != name):
            raise CheckpointError(
                f"{folder / name}: tensor {unlisted[0]} is not listed as this file's in "
                f"{index_path.name}"
            )
    return {tensor: folder / name for tensor, name in index.items()}


def _names_in(path: Path) -> list[str]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix == ".bin":
        return list(torch_tensors(path))
    with _open(path) as file:
        return list(file.keys())


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt: {one_line(error)}") from error


def lazy_tensor(path: Path, name: str, *, raw: bool = False) -> LazyTensor:
    """Tensor `name` of the file `path`; float16 becomes float32.

    Args:
        path: a file of safetensors, or one that torch has saved.
        name: of the tensor.
        raw: whether it may have a dtype that only quantised weights have.

    Raises:
        CheckpointError: a dtype that no checkpoint has.
    """
    if path.suffix == ".bin":
        tensor = torch_tensors(path)[name]
        if tensor.dtype.name not in DTYPES and not raw:
            raise CheckpointError(f"{path}: tensor {name} has dtype {tensor.dtype.name}")
        return tensor
    with _open(path) as file:
        stored = file.get_slice(name)
        shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
    if raw and dtype in _RAW:
        return LazyTensor(
            shape, _RAW[dtype], functools.partial(_read_raw, path, name, shape, dtype)
        )
    if dtype not in _READ_AS:
        raise CheckpointError(
            f"{path}: tensor {name} has dtype {dtype}; supported are {', '.join(_READ_AS)}"
        )
    target = DTYPES[_READ_AS[dtype]]

    def read() -> np.ndarray:
        # Opened anew each time: the pages of a kept memory map would pile up as this process's.
        with _open(path) as file:
            try:
                return file.get_tensor(name).astype(target, copy=False)
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{path}: tensor {name}: {one_line(error)}") from error

    return LazyTensor(shape, target, read)


def _read_raw(path: Path, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Values of a dtype that the library's numpy side may not know."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        file.seek(entry["data_offsets"][0], 1)
        values = np.fromfile(file, _RAW[dtype], math.prod(shape))
    if values.size != math.prod(shape):
        raise CheckpointError(f"{path}: tensor {name}: truncated")
    return values.reshape(shape)


def stored_tensors(folder: Path, scheme: Scheme | None = None) -> dict[str, LazyTensor]:
    """Every tensor of a model's folder by transformers' name for a model of text.

    Args:
        folder: where it is.
        scheme: how its weights are quantised; they are dequantised when they are read.

    Raises:
        CheckpointError: as `read_tensors`.
    """
    if scheme is None:
        return _raw_tensors(folder, raw=False)
    return plain_tensors(scheme, _raw_tensors(folder))


def _raw_tensors(folder: Path, *, raw: bool = True) -> dict[str, LazyTensor]:
    files = weights_in(folder)
    return {
        name: lazy_tensor(files[original], original, raw=raw)
        for original, name in text_names(files).items()
    }


def read_eight_bits(folder: Path, config: ModelConfig, scheme: Scheme) -> dict[str, LazyTensor]:
    """What of a folder's weights has 8 bits and can be kept, see `native_eight_bits`.

    Raises:
        CheckpointError: as `read_tensors`.
    """
    shapes = {name: tensor.shape for name, tensor in hf_tensors(config).items()}
    found = eight_bit_weights(scheme, _raw_tensors(folder)).items()
    fits = {name: weight for name, weight in found if weight.numbers.shape == shapes.get(name)}
    return native_eight_bits(config, fits)


def read_tensors(
    folder: Path, config: ModelConfig, scheme: Scheme | None = None
) -> dict[str, LazyTensor]:
    """Every weight of a Hugging Face folder by native name, in native layout.

    Each has the dtype in which it is stored; float16 becomes float32, and so does what is
    quantised.

    Raises:
        CheckpointError: names file and tensor that is missing, unexpected, misshapen, of an
            unsupported dtype, or in a file that is truncated or corrupt.
    """
    files = weights_in(folder)
    if config.num_layers > len(files):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: num_hidden_layers is {config.num_layers}, but the folder has "
            f"only {len(files)} tensors"
        )
    # Before a table of their names is made.
    apart = bool(family(config.architecture).hf_experts)
    experts = sum(spec.experts.count for spec in config.layer_specs if spec.experts and apart)
    if experts > len(files):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: all layers have {experts} experts, but the folder has only "
            f"{len(files)} tensors"
        )
    expected = hf_tensors(config)
    original = {name: stored for stored, name in text_names(files).items()}
    found: dict[str, LazyTensor] = {}
    for name, tensor in stored_tensors(folder, scheme).items():
        stored = original.get(name, name)
        path = files.get(stored, folder)
        if name not in expected:
            if is_redundant(name, config):
                continue
            raise CheckpointError(
                f"{path}: tensor {stored} is unexpected in a {config.architecture} by {CONFIG_FILE}"
            )
        if tensor.shape != (shape := expected[name].shape):
            raise CheckpointError(
                f"{path}: tensor {stored} has shape {list(tensor.shape)}, "
                f"but {CONFIG_FILE} needs {list(shape)}"
            )
        if tensor.dtype.name not in DTYPES:
            raise CheckpointError(f"{path}: tensor {stored} has dtype {tensor.dtype.name}")
        found[name] = tensor
    for name in expected:
        if name not in found:
            raise CheckpointError(f"{folder}: tensor {name} is missing")
    return native_tensors(config, found)


def with_saved_head(folder: Path, config: ModelConfig) -> ModelConfig:
    """`config`, untied where the folder holds an output head that differs from the embedding.

    transformers 5 does the same: what is saved counts, whatever `tie_word_embeddings` says.

    Raises:
        CheckpointError: as `read_tensors`.
    """
    files = weights_in(folder) if config.tie_word_embeddings else {}
    stored = {name: original for original, name in text_names(files).items()}
    if HEAD not in stored or EMBEDDING not in stored:
        return config
    embedding, head = stored[EMBEDDING], stored[HEAD]
    if _same_values(files[embedding], embedding, files[head], head):
        return config
    logger.warning(
        "%s: %s differs from the embedding although tie_word_embeddings is true; it is used",
        printable(str(files[head])),
        head,
    )
    return replace(config, tie_word_embeddings=False)


def _same_values(path_a: Path, name_a: str, path_b: Path, name_b: str) -> bool:
    """Whether two tensors hold the same numbers; reads those of safetensors in parts."""
    if path_a.suffix == ".bin":
        a, b = (lazy_tensor(p, n).read() for p, n in ((path_a, name_a), (path_b, name_b)))
        return np.array_equal(a.astype(np.float32), b.astype(np.float32), equal_nan=True)
    with _open(path_a) as file_a, _open(path_b) as file_b:
        a, b = file_a.get_slice(name_a), file_b.get_slice(name_b)
        if (shape := a.get_shape()) != b.get_shape():
            return False
        step = max(COMPARED_ELEMENTS // max(shape[-1], 1), 1)
        parts = (slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step))
        return all(
            np.array_equal(a[rows].astype(np.float32), b[rows].astype(np.float32), equal_nan=True)
            for rows in parts
        )


def native_tensors(config: ModelConfig, found: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Every native weight of a model whose Hugging Face tensors are `found`."""
    tensors: dict[str, LazyTensor] = {}
    for native, spec in weight_specs(config).items():
        dtypes = {found[name].dtype for name in hf_sources(config)[native]}
        dtype = dtypes.pop() if len(dtypes) == 1 else DTYPES["float32"]
        read = functools.partial(_read_native, native, config, found, dtype)
        tensors[native] = LazyTensor(spec.shape, dtype, read)
    return tensors


def _read_native(
    native: str, config: ModelConfig, found: Mapping[str, LazyTensor], dtype: np.dtype
) -> np.ndarray:
    return read_native(native, config, lambda name: found[name].astype(dtype).read())


def write_safetensors(
    folder: Path, tensors: Mapping[str, LazyTensor], name: str, report: Report = quiet
) -> None:
    """Writes `tensors` to `folder/name`, one at a time; large ones as shards with an index.

    The format is the published one (https://github.com/huggingface/safetensors): the library
    itself wants all tensors of a file in memory at once.
    """
    shards = list(_shards(tensors))
    if len(shards) == 1:
        _write_file(folder / name, tensors, report)
        return
    stem = name.removesuffix(".safetensors")
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        shard_name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / shard_name, shard, report)
        weight_map |= dict.fromkeys(shard, shard_name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{name}.index.json").write_text(json.dumps(index, indent=2))


def _shards(tensors: Mapping[str, LazyTensor]) -> Iterator[dict[str, LazyTensor]]:
    shard: dict[str, LazyTensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _write_file(path: Path, tensors: Mapping[str, LazyTensor], report: Report) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _STORED_AS[tensor.dtype.name],
            "shape": tensor.shape,
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            array = np.ascontiguousarray(tensor.read())
            file.write(array.reshape(-1).view(np.uint8).data)
            report(name, array.nbytes)
        file.flush()
        os.fsync(file.fileno())
