"""LoRA decode modules as PEFT's folders."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pshare_jax.convert.manifest import Manifest
from pshare_jax.convert.names import PEFT_PREFIX, Part, hf_shape, to_hf
from pshare_jax.convert.peft import linear_modules
from pshare_jax.convert.tensors import LazyTensor
from pshare_jax.core.split_rule import Invocation
from pshare_jax.models.config import ModelConfig

Exported = tuple[dict[str, Any], dict[str, LazyTensor]]


def exported_adapter(
    manifest: Manifest, tensors: Mapping[str, LazyTensor], base_name: str | None
) -> Exported:
    """The `adapter_config.json` of a LoRA decode module, and its tensors by PEFT's name.

    Projections that transformers computes as one get one adapter. Where they have different A, it
    has their ranks one after another, and B is zero but for each projection's own.

    Args:
        manifest: the module's.
        tensors: its factors by native name.
        base_name: what PEFT looks up.
    """
    certificate = manifest.certificate
    assert certificate is not None
    assert certificate.lora_alpha is not None
    assert certificate.lora_rank is not None
    rank, alpha = certificate.lora_rank, _plain(certificate.lora_alpha)
    found: dict[str, LazyTensor] = {}
    names: dict[str, int] = {}
    for module, parts in linear_modules(manifest.config).items():
        factors, blocks = _module(module, parts, tensors, manifest.config, rank)
        if factors:
            found |= factors
            leaf = module.rpartition(".")[2]
            names[leaf] = max(blocks, names.get(leaf, 1))
    options: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(names),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if wide := {name: blocks for name, blocks in names.items() if blocks > 1}:
        options["rank_pattern"] = {name: blocks * rank for name, blocks in wide.items()}
        options["alpha_pattern"] = {name: blocks * alpha for name, blocks in wide.items()}
    if isinstance(certificate.tail, Invocation):
        options["alora_invocation_tokens"] = list(certificate.tail.sequence)
    return options, found


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number


def _module(
    module: str,
    parts: Sequence[Part],
    tensors: Mapping[str, LazyTensor],
    config: ModelConfig,
    rank: int,
) -> tuple[dict[str, LazyTensor], int]:
    """One module's factors by PEFT's name, and how many ranks lie one after another in them."""
    paths = [part.native.removesuffix(".kernel") for part in parts]
    adapted = [path for path in paths if f"{path}.lora_a" in tensors]
    if not adapted:
        return {}, 0
    read = functools.partial(_read, tensors, config)
    blocks = len(adapted)
    first = f"{adapted[0]}.lora_a"
    # Each layer's module has the rank that the pattern says: fused ones are always laid out apart.
    shape_a = (rank * blocks, hf_shape(first, config, rank)[1])
    rows = [hf_shape(part.native, config)[0] for part in parts]

    def read_a() -> np.ndarray:
        return np.concatenate([read(f"{path}.lora_a") for path in adapted])

    def read_b() -> np.ndarray:
        out = np.zeros((sum(rows), rank * blocks), tensors[first].dtype)
        start = 0
        for path, count in zip(paths, rows, strict=True):
            if path in adapted:
                at = adapted.index(path) * rank
                out[start : start + count, at : at + rank] = read(f"{path}.lora_b")
            start += count
        return out

    dtype = tensors[first].dtype
    prefix = f"{PEFT_PREFIX}{module}"
    return {
        f"{prefix}.lora_A.weight": LazyTensor(shape_a, dtype, read_a),
        f"{prefix}.lora_B.weight": LazyTensor((sum(rows), rank * blocks), dtype, read_b),
    }, blocks


def _read(tensors: Mapping[str, LazyTensor], config: ModelConfig, native: str) -> np.ndarray:
    return to_hf(native, tensors[native].read(), config)
