"""GGUF files: configuration and tensors, dequantized on reading.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package
dequantizes, `gguf_header` finds; this file maps names, shapes and hyper-parameters to the native
ones.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import reprlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QuantizationType

from pshare_jax.convert.files import one_line
from pshare_jax.convert.gguf_header import read_header
from pshare_jax.convert.gguf_metadata import Metadata
from pshare_jax.convert.gguf_rope import FACTOR_TENSORS, rope_scaling
from pshare_jax.convert.names import (
    has_experts,
    hf_shape,
    hf_tensors,
    native_to_hf,
    read_native,
    to_native,
)
from pshare_jax.convert.tensors import DTYPES, LazyTensor
from pshare_jax.errors import CheckpointError, printable
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.registry import families, family
from pshare_jax.models.rope import LongRopeScaling
from pshare_jax.models.weights import weight_specs

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")

_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
MAX_PARTS = 1000
"""More are taken for a damaged or hostile file."""

MISTRAL_V01 = {
    "embedding_length": 4096,
    "block_count": 32,
    "feed_forward_length": 14336,
    "attention.head_count_kv": 8,
    "context_length": 32768,
}
"""By these and a theta of 10,000 a fine-tune of it is recognised, whatever its name."""

BLOCK_ELEMENTS = 1 << 18
"""Elements dequantized at once: few enough to stay in the processor's cache."""


class GGUFFile:
    """One model in a GGUF file.

    Args:
        path: the file, or any of the files that a model was split into.
        long_context: of LongRoPE's two lists of factors, take that for long contexts.

    Attributes:
        path: the file; of a split model, the first.
        config: the architecture.

    Raises:
        CheckpointError: no GGUF file, truncated or corrupt, or not a supported architecture.
    """

    def __init__(self, path: str | Path, *, long_context: bool = False):
        self.path = Path(path)
        self._fields, self._tensors = read_header(self.path)
        self._file_of: dict[str, Path] = {}
        if (parts := self.get("split.count", int, 0)) > 1:
            self._join(parts)
        architecture = self.get("general.architecture", str)
        by_name = {known.gguf: known for known in families() if known.gguf is not None}
        if architecture not in by_name:
            raise CheckpointError(
                f"{self.path}: architecture {architecture!r} is not supported; "
                f"supported are {', '.join(by_name)}"
            )
        self._gguf_architecture = architecture
        self._family = by_name[architecture]
        self.config = self._read_config(long_context)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Metadata `key` as a Python value of type `kind`; `default` when it is absent.

        Raises:
            CheckpointError: absent without a default, or of another type.
        """
        value = self._fields.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.path}: metadata {key} is missing")
            return default
        if kind is float and isinstance(value, float):
            # The shortest decimal of the float32 that is stored: 1e-05, not 9.99999974e-06.
            return float(str(np.float32(value)))
        if not isinstance(value, kind):
            raise CheckpointError(
                f"{self.path}: metadata {key} is {reprlib.repr(value)}, not {kind.__name__}"
            )
        return value

    def _join(self, parts: int) -> None:
        """Takes the tensors of all parts; only the first has the metadata of the model."""
        match = _PART.fullmatch(self.path.name)
        if match is None or int(match[2]) != parts or parts > MAX_PARTS:
            part = self.get("split.no", int, 0) + 1
            raise CheckpointError(
                f"{self.path}: is part {part} of {parts}, one of {parts} parts of a model, whose "
                f"files must be called NAME-{part:05d}-of-{parts:05d}.gguf and lie together"
            )
        self._tensors, first = {}, self.path
        for number in range(parts):
            path = self.path.with_name(f"{match[1]}-{number + 1:05d}-of-{match[2]}.gguf")
            if not path.is_file():
                raise CheckpointError(f"{path}: no such file; the model has {parts} parts")
            header = read_header(path)
            stated = header.fields.get("split.no"), header.fields.get("split.count")
            if stated != (number, parts):
                raise CheckpointError(f"{path}: says that it is another part of another split")
            if twice := sorted(set(header.tensors) & set(self._tensors)):
                raise CheckpointError(f"{path}: tensor {twice[0]} is in another part too")
            self._tensors |= header.tensors
            self._file_of |= dict.fromkeys(header.tensors, path)
            if number == 0:
                self._fields, first = header.fields, path
        self.path = first
        total = self.get("split.tensors.count", int, len(self._tensors))
        if total != len(self._tensors):
            raise CheckpointError(
                f"{self.path}: the parts hold {len(self._tensors)} tensors of {total}"
            )

    @property
    def context_key(self) -> str:
        """The name of the metadata that states the longest context."""
        return f"{self._gguf_architecture}.context_length"

    @property
    def quantised(self) -> list[str]:
        """The types of its tensors that are not plain numbers, by GGUF's names."""
        return sorted({t.type.name for t in self._tensors.values()} - {"F32", "F16", "BF16"})

    def names(self) -> list[str]:
        """The names of all metadata."""
        return list(self._fields)

    def has(self, key: str) -> bool:
        """Whether metadata `key` is there."""
        return key in self._fields

    def has_tensor(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self._tensors

    def vector(self, name: str) -> np.ndarray:
        """The tensor `name`, float32, which is there and has one axis.

        Raises:
            CheckpointError: it has more, or cannot be read.
        """
        if len(shape := self._tensors[name].shape) != 1:
            raise CheckpointError(
                f"{self.path}: tensor {name} has shape {list(shape)}, not one axis"
            )
        return self._read(name)

    def _read_config(self, long_context: bool) -> ModelConfig:
        scope = self._gguf_architecture
        metadata = Metadata(self, scope)
        known = self._family
        window = metadata.optional("attention.sliding_window", int, 0) or None
        if known.name == "llama" and metadata.optional("expert_count", int, 0):
            # So is Mixtral.
            self._family = known = family("mixtral")
        elif known.name == "llama" and window is not None:
            # Mistral is written as a llama; only the window tells them apart.
            self._family = known = family("mistral")
        if window is None:
            self._warn_of_lost_window()
        hidden_size, num_heads = metadata.size("embedding_length"), metadata.heads()
        head_dim = metadata.size("attention.key_length", hidden_size // num_heads)
        rotated = metadata.size("rope.dimension_count", head_dim)
        whole = ["attention.value_length"]
        if not known.gguf_rotates_part or rotated > head_dim or rotated % 2:
            whole.append("rope.dimension_count")
        for key in whole:
            if (size := metadata.optional(key, int, head_dim)) != head_dim:
                raise CheckpointError(
                    f"{self.path}: {key} is {size}; only the head size {head_dim} is supported"
                )
        if "token_embd.weight" not in self._tensors:
            raise CheckpointError(f"{self.path}: tensor token_embd.weight is missing")
        rope_theta = metadata.number("rope.freq_base", 10000.0)
        num_layers = metadata.size("block_count")
        scaling = rope_scaling(self, metadata, rotated, rope_theta, long_context=long_context)
        longest = metadata.size("context_length")
        if isinstance(scaling, LongRopeScaling) and not long_context:
            longest = min(longest, scaling.original_max_position_embeddings)
        try:
            config = ModelConfig(
                architecture=known.name,
                vocab_size=self._tensors["token_embd.weight"].shape[0],
                hidden_size=hidden_size,
                intermediate_size=metadata.size("feed_forward_length"),
                num_layers=num_layers,
                num_heads=num_heads,
                num_kv_heads=metadata.size("attention.head_count_kv", num_heads),
                head_dim=head_dim,
                rope_theta=rope_theta,
                rope_scaling=scaling,
                rope_fraction=rotated / head_dim,
                rms_norm_eps=metadata.number("attention.layer_norm_rms_epsilon"),
                max_position_embeddings=longest,
                tie_word_embeddings="output.weight" not in self._tensors,
                sliding_window=window,
                **known.fixed,
            )
            config = known.config_from_gguf(config, metadata)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        metadata.check_unread()
        if metadata.optional("expert_count", int, 0) and not config.has_experts:
            raise CheckpointError(
                f"{self.path}: a {scope} that is a mixture of experts is not supported"
            )
        return config

    def _check_layers(self) -> None:
        """More layers than tensors are refused before a table of their names is made."""
        if (layers := self.config.num_layers) > len(self._tensors):
            raise CheckpointError(
                f"{self.path}: metadata {self._gguf_architecture}.block_count is {layers}, but the "
                f"file has only {len(self._tensors)} tensors"
            )

    def _warn_of_lost_window(self) -> None:
        """Says so where the model looks like Mistral 7B v0.1 or a fine-tune: GGUF lost its window.

        Later ones have a larger theta and no window.
        """
        scope = self._gguf_architecture
        named = any(
            "mistral" in value.lower()
            for key, value in self._fields.items()
            if key.startswith("general.") and isinstance(value, str)
        )
        alike = all(self._fields.get(f"{scope}.{k}") == v for k, v in MISTRAL_V01.items())
        theta = self.get(f"{scope}.rope.freq_base", float, 10000.0)
        if scope in ("llama", "mistral") and theta == 10000.0 and (named or alike):
            logger.warning(
                "%s: looks like Mistral 7B v0.1, whose sliding window of 4096 tokens is not in the "
                "file: it is computed with full attention, which differs from 4096 tokens on; "
                "import the Hugging Face folder to keep the window",
                printable(str(self.path)),
            )

    def tensors(self) -> dict[str, LazyTensor]:
        """Every weight by native name, in native layout.

        Those stored as BF16 are bfloat16, all others float32.

        Raises:
            CheckpointError: a tensor is missing, unexpected, misshapen or of an unknown type.
        """
        self._check_layers()
        arch = getattr(gguf.MODEL_ARCH, self._family.gguf_tensors)
        names = gguf.get_tensor_name_map(arch, self.config.num_layers)
        specs = weight_specs(self.config)
        wanted: dict[str, list[str]] = {}
        for native in specs:
            wanted.setdefault(self._name_of(native, names), []).append(native)
        for name in self._tensors:
            if name not in wanted and name not in FACTOR_TENSORS:
                raise CheckpointError(
                    f"{self.path}: tensor {name} is unexpected in a {self.config.architecture}"
                )
        tensors: dict[str, LazyTensor] = {}
        for name, natives in wanted.items():
            self._check(name, natives)
            is_bf16 = self._tensors[name].type == QuantizationType.BF16
            dtype = DTYPES["bfloat16" if is_bf16 else "float32"]
            for native in natives:
                read = functools.partial(self._read_native, name, native, dtype)
                tensors[native] = LazyTensor(specs[native].shape, dtype, read)
        return {native: tensors[native] for native in specs}

    def _name_of(self, native: str, names: gguf.TensorNameMap) -> str:
        match = _LAYER.fullmatch(native)
        if match and match[2] in self._family.gguf_layer:
            return f"blk.{match[1]}.{self._family.gguf_layer[match[2]]}"
        module, _, suffix = native_to_hf(native, self.config).rpartition(".")
        return f"{names.get_name(module)}.{suffix}"

    def _check(self, name: str, natives: list[str]) -> None:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        expected = gguf_shape(natives[0], self.config)
        if len(natives) > 1:
            expected = hf_tensors(self.config)[native_to_hf(natives[0], self.config)].shape
        if tensor.shape != expected:
            raise CheckpointError(
                f"{self.path}: tensor {name} has shape {list(tensor.shape)}, "
                f"but the model's metadata needs {list(expected)}"
            )
        block = np.zeros((1, gguf.GGML_QUANT_SIZES[tensor.type][1]), np.uint8)
        try:
            gguf.dequantize(block, tensor.type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name}: type {tensor.type.name} cannot be dequantized"
            ) from error

    def _read_native(self, name: str, native: str, dtype: np.dtype) -> np.ndarray:
        array = self._family.weight_from_gguf(native, self._read(name, dtype), self.config)
        permuted = native.endswith((".attn.q.kernel", ".attn.k.kernel"))
        if permuted and self._family.gguf_rotates_pairs:
            array = unpermute_rope_rows(array, self.config.head_dim)
        if has_experts(native, self.config):
            return np.stack([to_native(native, part, self.config) for part in array])
        if self._is_fused(native):
            return read_native(native, self.config, lambda _: array)
        return to_native(native, array, self.config)

    def _is_fused(self, native: str) -> bool:
        fused = self._family.hf_fused.values()
        return any(native.endswith(f".{part}") for parts in fused for part in parts)

    def _read(self, name: str, dtype: np.dtype = DTYPES["float32"]) -> np.ndarray:
        """The dequantized values of the file's tensor `name`, rows first, rounded to `dtype`."""
        tensor = self._tensors[name]
        # Plain reads: pages of the reader's memory map would count as this process's memory.
        try:
            path = self._file_of.get(name, self.path)
            raw = np.fromfile(path, np.uint8, tensor.nbytes, offset=tensor.offset)
        except OSError as error:
            raise CheckpointError(f"{self.path}: tensor {name}: {one_line(error)}") from error
        if raw.size != tensor.nbytes:
            raise CheckpointError(f"{self.path}: tensor {name}: truncated")
        columns = tensor.shape[-1]
        rows = math.prod(tensor.shape[:-1])
        raw = raw.reshape(rows, -1)
        out = np.empty((rows, columns), dtype)
        step = max(BLOCK_ELEMENTS // columns, 1)
        for start in range(0, rows, step):
            block = raw[start : start + step]
            out[start : start + step] = gguf.dequantize(block, tensor.type)
        return out.reshape(tensor.shape)


def gguf_shape(native: str, config: ModelConfig) -> tuple[int, ...]:
    """The shape of a native weight in a GGUF file: all experts are one tensor."""
    shape = hf_shape(native, config)
    if not has_experts(native, config):
        return shape
    return (weight_specs(config)[native].shape[0], *shape)


def unpermute_rope_rows(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Undoes llama.cpp's row order of a query or key projection `[heads * head_dim, in]`.

    llama.cpp rotates neighbouring pairs, so its converter interleaves the two halves of each head;
    here and in Hugging Face's layout the halves are apart.
    """
    pairs = array.reshape(-1, head_dim // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
