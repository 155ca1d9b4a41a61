"""A second reading of Hugging Face folders, for `verify` alone.

It shares with the import what names and layouts mean, but not how files are found and parsed, which
head counts, what becomes of dtypes, and which files make the tokenizer: a fault of the import there
cannot hide by being made twice. How quantised weights are dequantised, and torch's own files, it
does share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pshare_jax.convert import hf_tokenizer
from pshare_jax.convert.files import one_line
from pshare_jax.convert.manifest import TOKENIZER_FILE, read_json
from pshare_jax.convert.names import hf_sources, hf_tensors, is_redundant, read_native
from pshare_jax.convert.quantised import plain_tensors
from pshare_jax.convert.schemes import read_scheme
from pshare_jax.convert.sources import Source
from pshare_jax.convert.tensors import DTYPES, FP8, LazyTensor
from pshare_jax.convert.torch_files import torch_tensors
from pshare_jax.errors import CheckpointError
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.hf_fields import with_long_factors
from pshare_jax.models.registry import config_from_hf, language_model
from pshare_jax.models.text_part import text_names
from pshare_jax.models.weights import weight_specs

_DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": DTYPES["bfloat16"],
    "F8_E4M3": FP8,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
_HEAD = "lm_head.weight"
_TOKENIZER_PATTERNS = ("*.jinja", "*/*.jinja", "tokenizer*.json", "special_tokens_map.json")


def read_folder(folder: Path, long_context: bool = False) -> Source:
    """The model in a Hugging Face folder; tensors keep their dtype, float16 excepted.

    Args:
        folder: where it is.
        long_context: see `sources.open_source`.

    Raises:
        CheckpointError: names the file or tensor that cannot be read, or has no place in the model.
    """
    stored: dict[str, LazyTensor] = {}
    for path in _weight_files(folder):
        stored |= torch_tensors(path) if path.suffix == ".bin" else _tensors_of(path)
    stored = {name: stored[original] for original, name in text_names(stored).items()}
    about = read_json(folder / hf_tokenizer.CONFIG_FILE)
    if (scheme := read_scheme(language_model(about))) is not None:
        stored = plain_tensors(scheme, stored)
    config = config_from_hf(with_long_factors(about) if long_context else about)
    if _HEAD in stored:
        # A head that is there counts; one that equals the embedding gives the same logits.
        config = replace(config, tie_word_embeddings=False)
    expected = hf_tensors(config)
    for name in stored:
        if name not in expected and not is_redundant(name, config):
            raise CheckpointError(f"{folder}: tensor {name} has no place in the model")
    for name, tensor in expected.items():
        if name not in stored or stored[name].shape != tensor.shape:
            raise CheckpointError(f"{folder}: tensor {name} is missing or misshapen")
    tensors: dict[str, LazyTensor] = {}
    for native, spec in weight_specs(config).items():
        dtype = stored[hf_sources(config)[native][0]].dtype
        read = partial(_read_native, native, stored, config)
        tensors[native] = LazyTensor(spec.shape, dtype, read)
    return Source(config, tensors, _tokenizer_files(folder, config.vocab_size))


def _weight_files(folder: Path) -> list[Path]:
    name = "model.safetensors"
    if not any((folder / file).is_file() for file in (name, f"{name}.index.json")):
        name = "pytorch_model.bin"
    index, names = folder / f"{name}.index.json", {name}
    if index.is_file():
        names = set(read_json(index)["weight_map"].values())
    return [folder / name for name in sorted(names)]


def _read_native(native: str, stored: Mapping[str, LazyTensor], config: ModelConfig) -> np.ndarray:
    return read_native(native, config, lambda name: stored[name].read())


def _tensors_of(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file: 8 bytes of length, a JSON header, the values."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        return {
            name: _lazy(path, 8 + length, entry)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {one_line(error)}") from error


def _lazy(path: Path, start: int, entry: dict[str, Any]) -> LazyTensor:
    shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
    first, last = entry["data_offsets"]
    count = math.prod(shape)
    if last - first != count * dtype.itemsize or start + last > path.stat().st_size:
        raise ValueError(f"a tensor of shape {list(shape)} lies at {first} to {last}")
    kept = DTYPES["float32"] if entry["dtype"] == "F16" else dtype

    def read() -> np.ndarray:
        values = np.fromfile(path, dtype, count, offset=start + first)
        return values.reshape(shape).astype(kept, copy=False)

    return LazyTensor(shape, kept, read)


def _tokenizer_files(folder: Path, vocab_size: int) -> dict[str, bytes]:
    """Every file of the folder that says how text becomes tokens, and what ends a reply."""
    files = hf_tokenizer.read_tokenizer_folder(folder, vocab_size)
    kept = (TOKENIZER_FILE, hf_tokenizer.GENERATION_FILE, hf_tokenizer.TEMPLATE_FILE)
    found = {path for pattern in _TOKENIZER_PATTERNS for path in folder.glob(pattern)}
    return {
        **{path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(found)},
        **{name: files[name] for name in kept if name in files},
    }
