"""Checkpoint folders: writing them tensor by tensor, loading them shard by shard.

The weights are an ordinary orbax checkpoint of one flat dict, which `orbax_save.py` writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from pshare_jax.convert.eight_bits import stood_for
from pshare_jax.convert.files import atomic_folder, check_space, one_line, write_files
from pshare_jax.convert.loading import load_gently, load_group, open_tensor
from pshare_jax.convert.manifest import (
    TOKENIZER_FILE,
    TOKENIZER_FOLDER,
    WEIGHTS_FOLDER,
    Manifest,
    TensorEntry,
    fingerprints,
    read_manifest,
    stored_specs,
    tokenizer_hash,
    write_manifest,
)
from pshare_jax.convert.progress import Report, quiet
from pshare_jax.convert.seals import write_seals
from pshare_jax.convert.tensors import DTYPES, STORED_DTYPES, LazyTensor, as_lazy, total_bytes
from pshare_jax.convert.zarr import chunk_shape
from pshare_jax.core.split_rule import LAST_TOKEN, SplitRule
from pshare_jax.errors import CheckpointError
from pshare_jax.models.config import ModelConfig, WeightFormat
from pshare_jax.models.quantise import dequantise
from pshare_jax.models.split import Certificate, tensor_hash
from pshare_jax.models.weights import SCALE, Weights, WeightSpec

__all__ = [
    "load_weights",
    "open_stored",
    "open_weights",
    "read_manifest",
    "read_tokenizer_files",
    "write_decode",
    "write_prefill",
]

GROUP_BYTES = 1 << 28
"""Tensors are loaded in groups of about this size, which bounds the host memory of a load."""


def _write_weights(
    dest: Path,
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    specs: Mapping[str, WeightSpec],
    report: Report,
) -> dict[str, TensorEntry]:
    check_space(folder, total_bytes(tensors))
    entries: dict[str, TensorEntry] = {}

    def done(name: str, array: np.ndarray) -> None:
        entries[name] = TensorEntry(array.shape, array.dtype.name, tensor_hash(array))
        report(name, array.nbytes)

    # Imported late: who only reads need not wait a second for orbax.
    from pshare_jax.convert.orbax_save import save

    chunks = {name: chunk_shape(spec) for name, spec in specs.items()}
    (folder / WEIGHTS_FOLDER).mkdir()
    save(folder / WEIGHTS_FOLDER, dest, tensors, chunks, done)
    return {name: entries[name] for name in specs}


def _check_tensors(tensors: Mapping[str, LazyTensor], specs: Mapping[str, WeightSpec]) -> str:
    """Checks names and shapes before anything is written; returns the common dtype's name."""
    for name, spec in specs.items():
        if name not in tensors:
            raise CheckpointError(f"tensor {name} is missing")
        if tensors[name].shape != spec.shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(tensors[name].shape)}, needs {list(spec.shape)}"
            )
        if spec.dtype not in (None, tensors[name].dtype.name):
            raise CheckpointError(
                f"tensor {name} has dtype {tensors[name].dtype.name}, needs {spec.dtype}"
            )
    if unknown := sorted(set(tensors) - set(specs)):
        raise CheckpointError(f"tensor {unknown[0]} is unexpected")
    dtypes = {tensors[name].dtype.name for name, spec in specs.items() if spec.dtype is None}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        raise CheckpointError(
            f"tensors of dtype {', '.join(sorted(dtypes))}: need one of float32, bfloat16"
        )
    return dtypes.pop()


def write_prefill(
    dest: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Any],
    tokenizer_files: Mapping[str, bytes],
    *,
    source_config: Mapping[str, Any] | None = None,
    weights: WeightFormat = "plain",
    report: Report = quiet,
) -> Manifest:
    """Writes a prefill checkpoint: all of it, or nothing.

    Args:
        dest: the folder to make; must not exist.
        config: the architecture.
        tensors: every weight of `weight_specs(config)`, of one dtype; LazyTensors are read one at
            a time.
        tokenizer_files: `tokenizer.json` and its companions by name.
        source_config: the Hugging Face `config.json` that the model came with, if any.
        weights: the form of `tensors`, where some of them have 8 bits and scales.
        report: called after each tensor.

    Raises:
        CheckpointError: `dest` exists or cannot be written; a tensor is missing, unexpected,
            misshapen, of an unsupported dtype, or could not be read.
    """
    lazy = {name: as_lazy(tensor) for name, tensor in tensors.items()}
    specs = stored_specs(config, None, weights)
    dtype = _check_tensors(lazy, specs)
    with atomic_folder(dest) as folder:
        write_files(folder / TOKENIZER_FOLDER, tokenizer_files)
        entries = _write_weights(Path(dest), folder, lazy, specs, report)
        hashed = tokenizer_hash(tokenizer_files)
        fingerprint, former = fingerprints(config, entries, hashed, None)
        manifest = Manifest(
            folder=Path(dest),
            kind="prefill",
            config=config,
            dtype=dtype,
            fingerprint=fingerprint,
            tokenizer_hash=hashed,
            certificate=None,
            tensors=entries,
            source_config=source_config,
            former=former,
            weights=weights,
        )
        write_manifest(folder, manifest)
        write_seals(folder, manifest)
    return manifest


def write_decode(
    dest: str | Path,
    base: Manifest,
    tensors: Mapping[str, Any],
    *,
    tail: SplitRule = LAST_TOKEN,
    cache_conditioned: bool,
    source_config: Mapping[str, Any] | None = None,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_targets: Sequence[str] | None = None,
    tokenizer_files: Mapping[str, bytes] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    weights: WeightFormat = "plain",
    report: Report = quiet,
) -> Manifest:
    """Writes a decode module for the prefill checkpoint `base`: all of it, or nothing.

    Args:
        dest: the folder to make; must not exist.
        base: the prefill checkpoint whose KV the module reads.
        tensors: every weight of the full module or, when `lora_rank` is given, of the LoRA module;
            LazyTensors are read one at a time.
        tail: which tokens of a prompt the module reads itself.
        cache_conditioned: whether the module was trained on the base's KV.
        source_config: the Hugging Face `config.json` that the weights came with, if any.
        lora_rank: rank of a LoRA module's factors; None for a full module, like the next two.
        lora_alpha: the update is `lora_alpha / lora_rank * a @ b`.
        lora_targets: adapted projections, out of `weights.LORA_TARGETS`.
        tokenizer_files: its own chat template and end tokens, see `module_tokenizer`.
        extra_files: contents of files to lay beside, by name.
        weights: as of `write_prefill`; of a full module.
        report: called after each tensor.

    Raises:
        CheckpointError: `base` is no prefill checkpoint, or as for `write_prefill`.
        CertificateError: an invocation for a full module.
    """
    if base.kind != "prefill":
        raise CheckpointError(f"{base.folder}: is a {base.kind} checkpoint, not a prefill one")
    lazy = {name: as_lazy(tensor) for name, tensor in tensors.items()}
    draft = Certificate(
        prefill_fingerprint=base.fingerprint,
        tail=tail,
        kind="full" if lora_rank is None else "lora",
        cache_conditioned=cache_conditioned,
        weights_fingerprint="unknown until the weights are written",
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_targets=None if lora_targets is None else tuple(lora_targets),
    )
    specs = stored_specs(base.config, draft, weights)
    dtype = _check_tensors(lazy, specs)
    with atomic_folder(dest) as folder:
        if tokenizer_files:
            write_files(folder / TOKENIZER_FOLDER, tokenizer_files)
        entries = _write_weights(Path(dest), folder, lazy, specs, report)
        fingerprint, former = fingerprints(base.config, entries, base.tokenizer_hash, draft)
        certificate = Certificate(**{**vars(draft), "weights_fingerprint": fingerprint})
        manifest = Manifest(
            folder=Path(dest),
            kind="decode",
            config=base.config,
            dtype=dtype,
            fingerprint=fingerprint,
            tokenizer_hash=base.tokenizer_hash,
            certificate=certificate,
            tensors=entries,
            source_config=source_config,
            former=former,
            weights=weights,
        )
        write_manifest(folder, manifest)
        write_seals(folder, manifest)
        write_files(folder, extra_files or {})
    return manifest


def read_tokenizer_files(manifest: Manifest) -> dict[str, bytes]:
    """The tokenizer's files of a prefill checkpoint by path below its folder; checks their hash.

    Raises:
        CheckpointError: they are not there, or have changed since the checkpoint was made.
    """
    folder = manifest.folder / TOKENIZER_FOLDER
    try:
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {one_line(error)}") from error
    if TOKENIZER_FILE not in files or tokenizer_hash(files) != manifest.tokenizer_hash:
        raise CheckpointError(
            f"{folder / TOKENIZER_FILE}: missing or changed since the import; import again"
        )
    return files


def _read(manifest: Manifest, name: str) -> np.ndarray:
    return open_tensor(manifest, name).read()()


def load_weights(
    folder: str | Path | Manifest,
    *,
    dtype: Any = None,
    shardings: Mapping[str, Sharding] | None = None,
    convert: Callable[[Weights], Weights] | None = None,
    gentle: bool = False,
) -> Weights:
    """Loads a checkpoint's tensors as jax.Arrays.

    Args:
        folder: a checkpoint, or its manifest.
        dtype: cast to this while reading; None keeps the stored dtype. Whole numbers and their
            scales are never cast.
        shardings: where each tensor goes; each device's shard is read on its own. A tensor without
            one goes to the default device.
        convert: what becomes of some of the tensors, which are given up then; called with all of
            them, a group at a time, 8 bits and their scales in one. By default these become
            what they stand for.
        gentle: slower, so that threads that serve meanwhile notice little of it.

    Returns:
        The flat dict of a full module, or for a LoRA decode module of its factors.

    Raises:
        CheckpointError: as `read_manifest`, or a tensor's file is missing, damaged or misshapen.
    """
    manifest = folder if isinstance(folder, Manifest) else read_manifest(folder)
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = _placed(manifest, shardings or {}, default)
    target = np.dtype(dtype or DTYPES[manifest.dtype])
    own = {name: spec.dtype for name, spec in manifest.specs.items()}
    dtypes = {n: target if (kept := own[n]) is None else STORED_DTYPES[kept] for n in placed}
    if convert is None and manifest.weights != "plain":
        convert = partial(dequantise, manifest.config, dtype=target)
    convert = convert or (lambda loaded: loaded)
    load = load_gently if gentle else load_group
    weights: Weights = {}
    group: list[str] = []
    size = 0
    for name, entry in manifest.tensors.items():
        if _is_scale(manifest, name):
            continue
        group += [n for n in (name, name + SCALE) if n in manifest.tensors]
        size += math.prod(entry.shape) * target.itemsize
        if size >= GROUP_BYTES:
            weights |= convert(load(manifest, group, dtypes, placed))
            group, size = [], 0
    return weights | convert(load(manifest, group, dtypes, placed))


def _is_scale(manifest: Manifest, name: str) -> bool:
    return name.endswith(SCALE) and name.removesuffix(SCALE) in manifest.tensors


def _placed(
    manifest: Manifest, shardings: Mapping[str, Sharding], default: Sharding
) -> dict[str, Sharding]:
    """Where each stored tensor goes: scales that nobody wants, to their weights' devices."""
    placed: dict[str, Sharding] = {}
    for name in manifest.tensors:
        found = shardings.get(name)
        if found is None and _is_scale(manifest, name):
            found = shardings.get(name.removesuffix(SCALE))
            if isinstance(found, NamedSharding):
                found = NamedSharding(found.mesh, PartitionSpec())
        placed[name] = default if found is None else found
    return placed


def open_weights(folder: str | Path | Manifest) -> dict[str, LazyTensor]:
    """A checkpoint's weights as LazyTensors: numpy arrays, read one at a time.

    Whole numbers are read as what they stand for, float32.

    Raises:
        CheckpointError: as `read_manifest`; and `read()` of a tensor whose file is missing or
            damaged.
    """
    manifest = folder if isinstance(folder, Manifest) else read_manifest(folder)
    stored = open_stored(manifest)
    return {
        name: stood_for(tensor, stored[name + SCALE]) if name + SCALE in stored else tensor
        for name, tensor in stored.items()
        if not _is_scale(manifest, name)
    }


def open_stored(manifest: Manifest) -> dict[str, LazyTensor]:
    """A checkpoint's tensors as they are stored; otherwise as `open_weights`."""
    return {
        name: LazyTensor(entry.shape, STORED_DTYPES[entry.dtype], partial(_read, manifest, name))
        for name, entry in manifest.tensors.items()
    }
