"""Tiny models and tokenizers for the conversion tests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from pshare_jax.convert import names
from pshare_jax.convert.tensors import DTYPES
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.registry import config_to_hf
from pshare_jax.models.weights import WeightSpec, weight_specs
from tests.helpers import tiny_config
from tests.text.tiny import write_byte_level

TOKENIZER_FILES = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
VOCAB_SIZE = 416
SAVED_AS = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float8_e4m3fn": "F8_E4M3",
    "int8": "I8",
    "int32": "I32",
}
"""Dtypes as safetensors names them."""

GGUF_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


def model_config(**overrides) -> ModelConfig:
    """A two-layer decoder that `write_byte_level`'s tokenizer fits."""
    return tiny_config(**{"vocab_size": VOCAB_SIZE, **overrides})


def gguf_config(**overrides) -> ModelConfig:
    """The same with rows that quantise in blocks of 32, and without llama3's rope scaling."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "rope_scaling": None}
    return model_config(**{**sizes, **overrides})


def random_tensors(
    specs: dict[str, WeightSpec], seed: int = 0, dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """Normal values for `specs`, in numpy."""
    rng = np.random.default_rng(seed)
    return {
        name: (0.05 * rng.standard_normal(spec.shape, dtype=np.float32)).astype(DTYPES[dtype])
        for name, spec in specs.items()
    }


def random_weights(config: ModelConfig, seed: int = 0, dtype: str = "float32"):
    """Random full weights of `config`."""
    return random_tensors(weight_specs(config), seed, dtype)


def hf_tensors(config: ModelConfig, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`weights` by Hugging Face name and in its layout."""
    return {
        names.native_to_hf(name, config): np.ascontiguousarray(names.to_hf(name, value, config))
        for name, value in weights.items()
    }


def write_hf_folder(
    folder: Path, config: ModelConfig, weights: dict[str, np.ndarray], shards: int = 1, **extra
) -> Path:
    """A Hugging Face folder as transformers writes it; `extra` goes into config.json."""
    write_byte_level(folder)
    about = {**config_to_hf(config), "bos_token_id": 0, "initializer_range": 0.02, **extra}
    (folder / "config.json").write_text(json.dumps(about))
    tensors = hf_tensors(config, weights)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def permute_rope_rows(array: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of query and key rows: row 2i of a head is row i, row 2i+1 is row d/2+i."""
    rows = array.reshape(heads, array.shape[0] // heads, *array.shape[1:])
    half = rows.shape[1] // 2
    out = np.empty_like(rows)
    out[:, 0::2], out[:, 1::2] = rows[:, :half], rows[:, half:]
    return out.reshape(array.shape)


def add_gguf_tensors(
    writer: gguf.GGUFWriter,
    config: ModelConfig,
    weights: dict[str, np.ndarray],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> dict[str, np.ndarray]:
    """Adds `weights` as llama.cpp's converter does; returns what each becomes by native name."""
    arch = GGUF_ARCHITECTURES[config.architecture]
    table = gguf.get_tensor_name_map(arch, config.num_layers)
    stored = {}
    for name, value in weights.items():
        module, _, suffix = names.native_to_hf(name, config).rpartition(".")
        value = np.ascontiguousarray(names.to_hf(name, value, config))
        raw_kind = kind if value.ndim > 1 else gguf.GGMLQuantizationType.F32
        raw = gguf.quantize(value, raw_kind)
        seen = gguf.dequantize(raw, raw_kind).reshape(value.shape)
        stored[name] = np.ascontiguousarray(names.to_native(name, seen, config))
        if arch == gguf.MODEL_ARCH.LLAMA and ".attn.q." in name:
            raw = permute_rope_rows(raw, config.num_heads)
        if arch == gguf.MODEL_ARCH.LLAMA and ".attn.k." in name:
            raw = permute_rope_rows(raw, config.num_kv_heads)
        writer.add_tensor(f"{table.get_name(module)}.{suffix}", raw, raw_dtype=raw_kind)
    return stored


def add_gguf_config(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """Adds the hyper-parameters as llama.cpp's converter does."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)


def add_gguf_tokenizer(writer: gguf.GGUFWriter, folder: Path, pre: str = "gpt-2") -> None:
    """Adds the byte-level tokenizer in `folder`, with its ChatML tokens as control tokens."""
    about = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    vocabulary = dict(about["model"]["vocab"])
    types = dict.fromkeys(vocabulary, gguf.TokenType.NORMAL)
    for token in about["added_tokens"]:
        vocabulary[token["content"]] = token["id"]
        special = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        types[token["content"]] = special
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([types[token] for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in about["model"]["merges"]])
    writer.add_bos_token_id(vocabulary[config["bos_token"]])
    writer.add_eos_token_id(vocabulary[config["eos_token"]])
    writer.add_chat_template(config["chat_template"])


def write_gguf(
    path: Path,
    config: ModelConfig,
    weights: dict[str, np.ndarray],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str | None = None,
    edit=lambda writer: None,
) -> dict[str, np.ndarray]:
    """A whole GGUF file; returns what each weight became by native name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = "llama" if config.architecture == "mistral" else config.architecture
    writer = gguf.GGUFWriter(path, architecture or name)
    add_gguf_config(writer, config)
    add_gguf_tokenizer(writer, write_byte_level(path.parent / "source_tokenizer"))
    stored = add_gguf_tensors(writer, config, weights, kind)
    edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def same_bits(a, b) -> bool:
    """Whether two arrays agree in dtype, shape and every bit."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def with_config(config: ModelConfig, **fields) -> ModelConfig:
    """`config` with `fields` replaced."""
    return dataclasses.replace(config, **fields)


def save_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A file with FP8 too, which the library's numpy side cannot write."""
    header: dict[str, Any] = {}
    offset = 0
    for name, value in tensors.items():
        entry = {"dtype": SAVED_AS[value.dtype.name], "shape": value.shape}
        header[name] = entry | {"data_offsets": [offset, offset := offset + value.nbytes]}
    text = json.dumps(header).encode()
    values = b"".join(np.ascontiguousarray(value).tobytes() for value in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)
