"""PEFT's LoRA folders: `adapter_config.json` and `adapter_model.safetensors`.

What is low-rank updates alone becomes a LoRA module. An adapter that changes more (DoRA's
magnitudes, weights that were trained as a whole, biases) is merged with the base into a full
module, see `peft_merge`.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pshare_jax.convert.hf import files_in, lazy_tensor
from pshare_jax.convert.manifest import read_json
from pshare_jax.convert.names import PEFT_PREFIX, Part, hf_shape, hf_tensors, to_native
from pshare_jax.convert.peft_options import AdapterOptions, read_options
from pshare_jax.convert.tensors import DTYPES, LazyTensor
from pshare_jax.convert.vocabulary import check_padding, first_rows
from pshare_jax.errors import CheckpointError
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.weights import LORA_TARGETS, lora_specs, lora_targets, projection_path

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(\.weight)?")
_SAVED = re.compile(r"(.+?)(\.base_layer|\.modules_to_save(\.default)?)?\.(weight|bias)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_HEAD = "lm_head.weight"
_EMBEDDINGS = ("model.embed_tokens.weight", _HEAD)


@dataclass(frozen=True)
class ModuleAdapter:
    """The adapter on one of transformers' linear modules: the update is `scale * b @ a`.

    Args:
        a: `[rank, in]`.
        b: `[out, rank]`.
        scale: see above.
        magnitude: `[out]` of DoRA: the norms that the adapted weight's rows are given.
    """

    a: LazyTensor
    b: LazyTensor
    scale: float
    magnitude: LazyTensor | None = None


@dataclass(frozen=True)
class AdapterSource:
    """What a PEFT folder holds, by transformers' names.

    Args:
        folder: for messages.
        modules: adapters by module, such as `model.layers.0.self_attn.q_proj`.
        saved: weights and biases that take the place of the base's.
        options: of `adapter_config.json`.
    """

    folder: Path
    modules: Mapping[str, ModuleAdapter]
    saved: Mapping[str, LazyTensor]
    options: AdapterOptions

    @property
    def is_lora(self) -> bool:
        """Whether it is low-rank updates of what LoRA modules can adapt, and nothing else."""
        plain = all(module.magnitude is None for module in self.modules.values())
        return plain and not self.saved and "lm_head" not in self.modules


@dataclass(frozen=True)
class LoraSource:
    """A LoRA module that can be converted.

    Args:
        tensors: its factors by native name, in native layout, read when asked.
        rank: columns of A.
        alpha: the update is `alpha / rank * a @ b`.
        targets: adapted projections in the order of `LORA_TARGETS`.
        invocation: see `AdapterOptions`.
    """

    tensors: Mapping[str, LazyTensor]
    rank: int
    alpha: float
    targets: tuple[str, ...]
    invocation: tuple[int, ...] | None = None


def linear_modules(config: ModelConfig) -> dict[str, tuple[Part, ...]]:
    """transformers' linear modules that an adapter may be on, and the native kernels in each."""
    kernels = {f"{projection_path(target)}.kernel" for target in lora_targets(config)}
    return {
        name.removesuffix(".weight"): tensor.parts
        for name, tensor in hf_tensors(config).items()
        if tensor.parts[0].native.split(".", 2)[-1] in kernels or name == "lm_head.weight"
    }


def read_adapter(folder: str | Path, config: ModelConfig) -> AdapterSource:
    """Finds and checks the adapter in a PEFT folder for a base of `config`.

    Raises:
        CheckpointError: names the option that is not supported, or file and tensor that is missing,
            unexpected, misshapen, or in a file that is truncated or corrupt.
    """
    folder = Path(folder)
    path = folder / ADAPTER_CONFIG
    options = read_options(path, read_json(path))
    files = files_in(folder, ADAPTER_WEIGHTS)
    linear = linear_modules(config)
    factors: dict[str, dict[str, LazyTensor]] = {}
    saved: dict[str, LazyTensor] = {}
    for name, file in files.items():
        plain = name.removeprefix(PEFT_PREFIX)
        if match := _FACTOR.fullmatch(plain):
            module, part = match[1], match[2]
        elif match := _MAGNITUDE.fullmatch(plain):
            module, part = match[1], "magnitude"
        elif match := _SAVED.fullmatch(plain):
            module, part = f"{match[1]}.{match[4]}", "saved"
        else:
            module, part = plain, "unknown"
        fits = hf_tensors(config) if part == "saved" else linear
        known = module in fits or (part == "saved" and module in _EMBEDDINGS)
        allowed = options.dora if part == "magnitude" else part != "unknown"
        if part in ("A", "B") and options.layers is not None:
            allowed = allowed and _layer(module) in options.layers
        if not (known and allowed and name.startswith(PEFT_PREFIX)):
            raise CheckpointError(
                f"{file}: tensor {name} is unexpected; LoRA on {', '.join(LORA_TARGETS)} of a "
                f"{config.architecture} base with {config.num_layers} layers is supported, and "
                "weights of it that were trained as a whole"
            )
        tensor = lazy_tensor(file, name)
        if part == "saved":
            saved[module] = _checked(folder, file, name, tensor, module, config)
        else:
            factors.setdefault(module, {})[part] = tensor
    modules = {
        module: _module_adapter(folder, module, parts, config, options)
        for module, parts in factors.items()
    }
    if not modules and not saved:
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS}: holds no adapter")
    return AdapterSource(folder, modules, saved, options)


def _layer(module: str) -> int | None:
    match = _LAYER.match(module)
    return int(match[1]) if match else None


def without_copies(
    source: AdapterSource, config: ModelConfig, base: Mapping[str, LazyTensor]
) -> AdapterSource:
    """The adapter without an embedding and a head that are the base's own.

    PEFT saves them with every adapter for a model whose vocabulary was resized.
    """
    own = base["embed.embedding"]
    if not (saved := {name: source.saved[name] for name in _EMBEDDINGS if name in source.saved}):
        return source
    for name, tensor in saved.items():
        kernel = own
        if name == _HEAD and not config.tie_word_embeddings:
            kernel = base["lm_head.kernel"]
        values = kernel.read() if kernel is own else kernel.read().T
        if not np.array_equal(tensor.read().astype(own.dtype), values):
            return source
    return replace(source, saved={n: t for n, t in source.saved.items() if n not in saved})


def _checked(
    folder: Path, file: Path, name: str, tensor: LazyTensor, module: str, config: ModelConfig
) -> LazyTensor:
    """A saved tensor of the base's shape; rows of padding are left out."""
    if module in _EMBEDDINGS:
        wanted = (config.vocab_size, config.hidden_size)
        if len(tensor.shape) != 2 or tensor.shape[1] != wanted[1] or tensor.shape[0] < wanted[0]:
            raise CheckpointError(
                f"{file}: tensor {name}: the adapter brings an embedding or output head of shape "
                f"{list(tensor.shape)}, the base's is {list(wanted)}: it was made for another base"
            )
        if tensor.shape[0] > wanted[0]:
            check_padding(folder, folder, tensor.shape[0], wanted[0])
            return first_rows(tensor, wanted[0])
    if module not in hf_tensors(config):
        # A tied head: `peft_merge` compares it with the embedding.
        return tensor
    if tensor.shape != (expected := hf_tensors(config)[module].shape):
        raise CheckpointError(
            f"{file}: tensor {name} has shape {list(tensor.shape)}, but this base needs "
            f"{list(expected)}"
        )
    return tensor


def saved_embeddings(folder: Path) -> tuple[LazyTensor, LazyTensor | None]:
    """The embedding and output head `[tokens, embed]` that an adapter brings; no head for None.

    Raises:
        CheckpointError: it brings no embedding, or cannot be read.
    """
    found: dict[str, LazyTensor] = {}
    for name, file in files_in(folder, ADAPTER_WEIGHTS).items():
        match = _SAVED.fullmatch(name.removeprefix(PEFT_PREFIX))
        if match and f"{match[1]}.{match[4]}" in _EMBEDDINGS:
            found[f"{match[1]}.{match[4]}"] = lazy_tensor(file, name)
    embedding, head = (found.get(name) for name in _EMBEDDINGS)
    if embedding is None:
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS}: brings no embedding")
    return embedding, head


def _module_adapter(
    folder: Path,
    module: str,
    parts: Mapping[str, LazyTensor],
    config: ModelConfig,
    options: AdapterOptions,
) -> ModuleAdapter:
    rank = options.rank_of(module)
    out, inputs = hf_tensors(config)[f"{module}.weight"].shape
    shapes: dict[str, tuple[int, ...]] = {"A": (rank, inputs), "B": (out, rank)}
    if options.dora:
        shapes["magnitude"] = (out,)
    for part, expected in shapes.items():
        name = f"{PEFT_PREFIX}{module}.lora_{part}.weight"
        if part == "magnitude":
            name = f"{PEFT_PREFIX}{module}.lora_magnitude_vector"
        if part not in parts:
            raise CheckpointError(f"{folder}: tensor {name} is missing")
        if parts[part].shape != expected:
            raise CheckpointError(
                f"{folder}: tensor {name} has shape {list(parts[part].shape)}, but r={rank} on "
                f"this base needs {list(expected)}"
            )
    return ModuleAdapter(parts["A"], parts["B"], options.scale_of(module), parts.get("magnitude"))


def read_lora(
    folder: str | Path, config: ModelConfig, base: Mapping[str, LazyTensor] | None = None
) -> LoraSource:
    """The LoRA module in a PEFT folder for a base of `config`.

    What the adapter has of the weights `base` besides, as they are, is no part of it.

    Raises:
        CheckpointError: see `read_adapter`; or the adapter is more than a LoRA module.
    """
    source = read_adapter(folder, config)
    if base is not None:
        source = without_copies(source, config, base)
    if not source.is_lora:
        more = next(iter(source.saved), "DoRA or an adapted output head")
        raise CheckpointError(
            f"{source.folder}: is no LoRA module alone: {more}; `convert decoder --lora` merges it "
            "into a full one"
        )
    return as_lora(source, config)


def as_lora(source: AdapterSource, config: ModelConfig) -> LoraSource:
    """An adapter that `is_lora` as one module: of one rank and scale, on all layers alike.

    Smaller ranks are padded with zeros, layers without adapters have zeros, other scales are folded
    into B. Several projections that transformers computes as one share A and have rows of B each.
    """
    scales = Counter(module.scale for module in source.modules.values() if module.scale)
    if not scales:
        raise CheckpointError(f"{source.options.path}: lora_alpha is 0: the adapter does nothing")
    ((scale, _),) = scales.most_common(1)
    rank = max(module.a.shape[0] for module in source.modules.values())
    found: dict[str, LazyTensor] = {}
    for name, module in source.modules.items():
        start = 0
        for part in linear_modules(config)[name]:
            rows = hf_shape(part.native, config)[0]
            path = part.native.removesuffix(".kernel")
            ratio = module.scale / scale
            found |= _native_factors(path, module, slice(start, start + rows), ratio, rank, config)
            start += rows
    adapted = {native.split(".")[3] for native in found}
    targets = tuple(target for target in LORA_TARGETS if target in adapted)
    dtype = next(iter(found.values())).dtype
    tensors = {
        native: found.get(native) or _zeros(spec.shape, dtype)
        for native, spec in lora_specs(config, rank, targets).items()
    }
    return LoraSource(tensors, rank, scale * rank, targets, source.options.invocation)


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> LazyTensor:
    return LazyTensor(shape, dtype, functools.partial(np.zeros, shape, dtype))


def _native_factors(
    path: str,
    module: ModuleAdapter,
    rows: slice,
    ratio: float,
    rank: int,
    config: ModelConfig,
) -> dict[str, LazyTensor]:
    """Factors of one projection by native name, padded to `rank`; B is multiplied by `ratio`."""
    a_name, b_name = f"{path}.lora_a", f"{path}.lora_b"
    missing = rank - module.a.shape[0]

    def read_a() -> np.ndarray:
        a = np.pad(module.a.read(), ((0, missing), (0, 0)))
        return to_native(a_name, a, config)

    def read_b() -> np.ndarray:
        b = np.pad(module.b.read()[rows], ((0, 0), (0, missing)))
        if ratio != 1.0:
            b = b.astype(np.float32) * np.float32(ratio)
        return to_native(b_name, b, config)

    target = path.rpartition(".")[2]
    specs = lora_specs(config, rank, (target,))
    # Multiplied, it need not be a bfloat16 any more.
    b_dtype = module.b.dtype if ratio == 1.0 else DTYPES["float32"]
    return {
        a_name: LazyTensor(specs[a_name].shape, module.a.dtype, read_a),
        b_name: LazyTensor(specs[b_name].shape, b_dtype, read_b),
    }
