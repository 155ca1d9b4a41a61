"""PEFT's LoRA folders: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pshare_jax.convert.hf import in_native_layout, lazy_safetensor, safetensors_in
from pshare_jax.convert.manifest import Manifest, read_json
from pshare_jax.convert.names import PEFT_PREFIX, hf_shape, hf_to_native, native_to_hf
from pshare_jax.convert.tensors import LazyTensor
from pshare_jax.errors import CheckpointError
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.weights import LORA_TARGETS, lora_specs

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_REQUIRED = {"peft_type": ("LORA",), "bias": ("none",)}
"""Options with one meaning that is supported."""

_READ = {"r", "lora_alpha", "use_rslora", "target_modules"}
_WITHOUT_EFFECT = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "exclude_modules",
    "lora_dropout",
    "layers_pattern",
    "megatron_core",
    "eva_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
}
"""Options that steer training or loading and leave the adapted model as it is."""

_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base's weights alone."""

_EMBEDDING = re.compile(r"\.(embed_tokens|lm_head)(\.base_layer|\.modules_to_save.*)?\.weight$")
_NAME = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.\w+\.(\w+)_proj\.lora_[AB]\.weight")


@dataclass(frozen=True)
class LoraSource:
    """A LoRA module that can be converted.

    Args:
        tensors: its factors by native name, in native layout, read when asked.
        rank: columns of A.
        alpha: the update is `alpha / rank * a @ b`.
        targets: adapted projections in the order of `LORA_TARGETS`.
    """

    tensors: Mapping[str, LazyTensor]
    rank: int
    alpha: float
    targets: tuple[str, ...]


def read_lora(folder: str | Path, config: ModelConfig) -> LoraSource:
    """Finds and checks the LoRA module in a PEFT folder for a base of `config`.

    Rank-stabilised LoRA (scale `alpha / sqrt(rank)`) is expressed by a larger alpha.

    Raises:
        CheckpointError: names the option that is not supported, or file and tensor that is missing,
            unexpected, misshapen, or in a file that is truncated or corrupt.
    """
    folder = Path(folder)
    path = folder / ADAPTER_CONFIG
    options = read_json(path)
    rank, alpha = _read_options(path, options)
    files = safetensors_in(folder, ADAPTER_WEIGHTS)
    targets = _targets(files)
    found: dict[str, LazyTensor] = {}
    for name, file in files.items():
        _check_no_embedding(file, name)
        native = hf_to_native(name.removeprefix(PEFT_PREFIX), config)
        if native is None or ".lora_" not in native or not name.startswith(PEFT_PREFIX):
            raise CheckpointError(
                f"{file}: tensor {name} is unexpected; LoRA on {', '.join(LORA_TARGETS)} of a "
                f"{config.architecture} base with {config.num_layers} layers is supported"
            )
        tensor = lazy_safetensor(file, name)
        if tensor.shape != (expected := hf_shape(native, config, rank)):
            raise CheckpointError(
                f"{file}: tensor {name} has shape {list(tensor.shape)}, but r={rank} on this base "
                f"needs {list(expected)}"
            )
        found[native] = tensor
    specs = lora_specs(config, rank, targets)
    for native in specs:
        if native not in found:
            raise CheckpointError(
                f"{folder}: tensor {PEFT_PREFIX}{native_to_hf(native, config)} is missing; each "
                "target must be adapted in all layers"
            )
    tensors = {
        native: in_native_layout(native, found[native], config, spec.shape)
        for native, spec in specs.items()
    }
    return LoraSource(tensors, rank, alpha, targets)


def _check_no_embedding(file: Path, name: str) -> None:
    """Names the cause where an adapter brings an embedding or a head, as PEFT saves them."""
    if _EMBEDDING.search(name):
        raise CheckpointError(
            f"{file}: tensor {name}: the adapter brings an embedding or output head of its own "
            "(the vocabulary was resized, or they were trained with it), which is not supported; "
            "merge it (peft's merge_and_unload) and convert the result with --from; after a resize "
            "import a base that was resized the same way"
        )


def _read_options(path: Path, options: Mapping[str, Any]) -> tuple[int, float]:
    for name, allowed in _REQUIRED.items():
        if options.get(name, allowed[0]) not in allowed:
            raise CheckpointError(
                f"{path}: {name}={reprlib.repr(options[name])} is not supported, only "
                f"{allowed[0]!r} is"
            )
    if options.get("init_lora_weights") not in _INITIALISATIONS:
        raise CheckpointError(
            f"{path}: init_lora_weights={reprlib.repr(options['init_lora_weights'])} is not "
            "supported: it changes the base's weights"
        )
    known = {*_REQUIRED, *_READ, *_WITHOUT_EFFECT, "init_lora_weights"}
    for name, value in options.items():
        if name not in known and value not in (None, False, {}, []):
            raise CheckpointError(f"{path}: {name}={reprlib.repr(value)} is not supported")
    rank, alpha = options.get("r"), options.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{path}: r={reprlib.repr(rank)} is not a rank")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"{path}: lora_alpha={reprlib.repr(alpha)} is not a number")
    return rank, alpha * math.sqrt(rank) if options.get("use_rslora") else float(alpha)


def _targets(names: Mapping[str, Any]) -> tuple[str, ...]:
    matches = (_NAME.fullmatch(name) for name in names)
    found = {match[2] for match in matches if match}
    return tuple(target for target in LORA_TARGETS if target in found)


def adapter_config(manifest: Manifest, base_name: str | None) -> dict[str, Any]:
    """The `adapter_config.json` of a LoRA decode module; `base_name` is what PEFT looks up."""
    certificate = manifest.certificate
    assert certificate is not None
    assert certificate.lora_alpha is not None
    alpha = certificate.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": certificate.lora_rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": [f"{target}_proj" for target in certificate.lora_targets or ()],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def adapter_tensor_name(native: str, config: ModelConfig) -> str:
    """PEFT's name of a LoRA factor."""
    return PEFT_PREFIX + native_to_hf(native, config)


def write_adapter_config(folder: Path, options: Mapping[str, Any]) -> None:
    """Writes `adapter_config.json` into `folder`."""
    (folder / ADAPTER_CONFIG).write_text(json.dumps(options, indent=2) + "\n")
