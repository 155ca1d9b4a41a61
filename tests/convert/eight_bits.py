"""Folders of a tiny model whose weights have 8 bits, as their libraries write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pshare_jax.convert import hf
from pshare_jax.convert.tensors import FP8, INT8, LazyTensor
from tests.convert.helpers import (
    hf_tensors,
    model_config,
    random_weights,
    save_safetensors,
    write_hf_folder,
)
from tests.golden import GOLDEN

CONFIG = model_config(architecture="qwen2", intermediate_size=96, tie_word_embeddings=False)
"""With biases, and a head of its own."""
WEIGHTS = random_weights(CONFIG, dtype="bfloat16")
HEAD = "lm_head"
DTYPES = {"int8": INT8, "fp8": FP8}
TITLES = {"int8": "whole numbers of 8 bits", "fp8": "FP8 numbers (e4m3)"}
WRITTEN = {
    "int8": ("int-quantized", {"num_bits": 8}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float"}),
}


def written_by_compressed_tensors(scheme: str) -> tuple[dict[str, LazyTensor], np.ndarray]:
    """A weight that this library has written by `scheme`: its parts, and what they stand for."""
    path = GOLDEN / "stored" / "compressed.safetensors"
    names = [name for name in hf.files_in(path.parent, path.name) if name.startswith(f"{scheme}/")]
    parts = {"x." + name.partition("/")[2]: hf.lazy_tensor(path, name, raw=True) for name in names}
    return parts, parts.pop("x.expected").read()


def numbers_of(shape: tuple[int, ...], seed: int, form: str = "int8") -> np.ndarray:
    """With both ends of the range; most rows have neither. Of FP8 all bytes, but for NaN's."""
    rng = np.random.default_rng(seed)
    if form == "fp8":
        numbers = (rng.integers(0, 0x7F, shape) | rng.integers(0, 2, shape) << 7).astype(np.uint8)
        return numbers.view(FP8)
    numbers = rng.integers(-90, 91, shape).astype(np.int8)
    numbers[0, 0], numbers[1, 0] = -128, 127
    return numbers


def bytes_of(array: Any) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


def write_folder(
    folder: Path, form: str = "int8", *, head: bool = True, **parts: Any
) -> dict[str, Any]:
    """As LLM Compressor writes W8A8 of channels; returns numbers and scales by module.

    Args:
        folder: to write.
        form: of the numbers.
        head: whether the output head is quantised too.
        parts: more of what each module has.
    """
    about = {
        "quant_method": "compressed-tensors",
        "format": WRITTEN[form][0],
        "config_groups": {"group_0": {"weights": WRITTEN[form][1], "targets": ["Linear"]}},
    }
    write_hf_folder(folder, CONFIG, {}, quantization_config=about)
    stored: dict[str, np.ndarray] = {}
    quantised: dict[str, Any] = {}
    for seed, (name, value) in enumerate(hf_tensors(CONFIG, WEIGHTS).items()):
        module = name.removesuffix(".weight")
        if not (name.endswith("_proj.weight") or (head and module == HEAD)):
            stored[name] = value
            continue
        numbers = numbers_of(value.shape, seed, form)
        scale = np.random.default_rng(seed).uniform(1e-4, 1e-3, (len(value), 1))
        scale = scale.astype(ml_dtypes.bfloat16)
        stored |= {name: numbers, f"{module}.weight_scale": scale}
        stored |= {f"{module}.{part}": make(value.shape) for part, make in parts.items()}
        quantised[module] = numbers, scale
    save_safetensors(folder / "model.safetensors", stored)
    return quantised
