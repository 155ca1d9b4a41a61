"""Checkpoint folders: writing them tensor by tensor, loading them shard by shard.

The weights are an ordinary orbax checkpoint (one flat dict, Zarr 3). Each tensor is one file of
inner chunks that lie along the axis on which tensor parallelism cuts it, each with a CRC-32C: a
device reads the byte ranges of its shard and no others, and a damaged file is noticed at load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from pshare_jax.convert.files import atomic_folder, check_space, one_line
from pshare_jax.convert.manifest import (
    TOKENIZER_FILE,
    TOKENIZER_FOLDER,
    WEIGHTS_FOLDER,
    Manifest,
    TensorEntry,
    fingerprint_of,
    lora_context,
    read_manifest,
    stored_specs,
    tokenizer_hash,
    write_manifest,
)
from pshare_jax.convert.progress import Report, quiet
from pshare_jax.convert.tensors import DTYPES, LazyTensor, as_lazy, total_bytes
from pshare_jax.errors import CheckpointError
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.split import Certificate, tensor_hash
from pshare_jax.models.weights import Weights, WeightSpec
from pshare_jax.sharding.rules import MESH_AXES

__all__ = [
    "load_weights",
    "open_weights",
    "read_manifest",
    "read_tokenizer_files",
    "write_decode",
    "write_prefill",
]

MAX_CHUNKS = 16
"""Most chunks of one tensor: loading on up to this many devices reads each byte once."""

RESTORE_BYTES = 1 << 30
"""Tensors are restored in groups of about this size, which bounds the host memory of a load."""


def chunk_shape(spec: WeightSpec) -> tuple[int, ...]:
    """Shape of a tensor's stored chunks: at most `MAX_CHUNKS` along the axis that meshes split."""
    axis = next((i for i, name in enumerate(spec.axes) if MESH_AXES[name] is not None), None)
    if axis is None:
        return spec.shape
    size = spec.shape[axis]
    chunks = max(n for n in range(1, MAX_CHUNKS + 1) if size % n == 0)
    return (*spec.shape[:axis], size // chunks, *spec.shape[axis + 1 :])


def _zarr_spec(path: Path, tensor: LazyTensor, chunk: Sequence[int]) -> dict[str, Any]:
    data = {"name": "bytes", "configuration": {"endian": "little"}}
    checked = [data, {"name": "crc32c"}]
    sharding = {"chunk_shape": chunk, "codecs": checked, "index_codecs": checked}
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": {
            "shape": tensor.shape,
            "data_type": tensor.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": tensor.shape}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
    }


class _LazyTensorHandler(type_handlers.NumpyHandler):
    """Lets orbax save LazyTensors: one is read, written and forgotten before the next.

    Orbax's own handlers want all arrays at once and cannot be given the chunk axis.
    """

    def __init__(self, chunks: Mapping[str, Sequence[int]], done: Callable[[str, Any], None]):
        super().__init__()
        self._chunks = chunks
        self._done = done

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> list[Any]:
        del args
        # The whole folder is flushed once at the end.
        context = ts.Context({"file_io_sync": False})
        for tensor, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            array = np.ascontiguousarray(tensor.read())
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise CheckpointError(
                    f"tensor {info.name}: read as {array.dtype}{list(array.shape)}, "
                    f"announced as {tensor.dtype}{list(tensor.shape)}"
                )
            spec = _zarr_spec(info.parent_dir / info.name, tensor, self._chunks[info.name])
            try:
                store = await ts.open(spec, create=True, context=context)
                await store.write(array, can_reference_source_data_indefinitely=True)
            except ValueError as error:
                raise CheckpointError(
                    f"tensor {info.name}: not written: {one_line(error)}"
                ) from error
            self._done(info.name, array)
        return []


def _write_weights(
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

    handler = _LazyTensorHandler({name: chunk_shape(spec) for name, spec in specs.items()}, done)
    # Orbax warns about a registry without jax.Array, though none is saved here.
    registry = type_handlers.create_type_handler_registry(
        (LazyTensor, handler),
        (jax.Array, type_handlers.ArrayHandler(array_metadata_store=None)),
    )
    saver = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=True, type_handler_registry=registry
    )
    (folder / WEIGHTS_FOLDER).mkdir()
    saver.save(folder / WEIGHTS_FOLDER, args=ocp.args.PyTreeSave(dict(tensors)))  # type: ignore[arg-type]
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
    if unknown := sorted(set(tensors) - set(specs)):
        raise CheckpointError(f"tensor {unknown[0]} is unexpected")
    dtypes = {tensor.dtype.name for tensor in tensors.values()}
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
        report: called after each tensor.

    Raises:
        CheckpointError: `dest` exists or cannot be written; a tensor is missing, unexpected,
            misshapen, of an unsupported dtype, or could not be read.
    """
    lazy = {name: as_lazy(tensor) for name, tensor in tensors.items()}
    specs = stored_specs(config, None)
    dtype = _check_tensors(lazy, specs)
    with atomic_folder(dest) as folder:
        tokenizer = folder / TOKENIZER_FOLDER
        tokenizer.mkdir()
        for name, data in tokenizer_files.items():
            (tokenizer / name).write_bytes(data)
        entries = _write_weights(folder, lazy, specs, report)
        hashed = tokenizer_hash(tokenizer_files)
        manifest = Manifest(
            folder=Path(dest),
            kind="prefill",
            config=config,
            dtype=dtype,
            fingerprint=fingerprint_of(config, entries, hashed),
            tokenizer_hash=hashed,
            certificate=None,
            tensors=entries,
            source_config=source_config,
        )
        write_manifest(folder, manifest)
    return manifest


def write_decode(
    dest: str | Path,
    base: Manifest,
    tensors: Mapping[str, Any],
    *,
    tail: int = 1,
    cache_conditioned: bool,
    source_config: Mapping[str, Any] | None = None,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_targets: Sequence[str] | None = None,
    report: Report = quiet,
) -> Manifest:
    """Writes a decode module for the prefill checkpoint `base`: all of it, or nothing.

    Args:
        dest: the folder to make; must not exist.
        base: the prefill checkpoint whose KV the module reads.
        tensors: every weight of the full module or, when `lora_rank` is given, of the LoRA module;
            LazyTensors are read one at a time.
        tail: how many of a prompt's last tokens the module reads itself.
        cache_conditioned: whether the module was trained on the base's KV.
        source_config: the Hugging Face `config.json` that the weights came with, if any.
        lora_rank: rank of a LoRA module's factors; None for a full module, like the next two.
        lora_alpha: the update is `lora_alpha / lora_rank * a @ b`.
        lora_targets: adapted projections, out of `weights.LORA_TARGETS`.
        report: called after each tensor.

    Raises:
        CheckpointError: `base` is no prefill checkpoint, or as for `write_prefill`.
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
    specs = stored_specs(base.config, draft)
    dtype = _check_tensors(lazy, specs)
    with atomic_folder(dest) as folder:
        entries = _write_weights(folder, lazy, specs, report)
        context = base.tokenizer_hash if draft.kind == "full" else lora_context(draft)
        fingerprint = fingerprint_of(base.config, entries, context)
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
        )
        write_manifest(folder, manifest)
    return manifest


def read_tokenizer_files(manifest: Manifest) -> dict[str, bytes]:
    """The tokenizer's files of a prefill checkpoint by name; checks their hash.

    Raises:
        CheckpointError: they are not there, or have changed since the checkpoint was made.
    """
    folder = manifest.folder / TOKENIZER_FOLDER
    try:
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {one_line(error)}") from error
    if TOKENIZER_FILE not in files or tokenizer_hash(files) != manifest.tokenizer_hash:
        raise CheckpointError(
            f"{folder / TOKENIZER_FILE}: missing or changed since the import; import again"
        )
    return files


def _read(folder: Path, name: str) -> np.ndarray:
    """Reads one tensor without orbax, which would parse the metadata of all tensors each time."""
    path = folder / WEIGHTS_FOLDER / name
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    try:
        return ts.open(spec, open=True).result().read().result()
    except ValueError as error:
        raise CheckpointError(f"{path}: tensor cannot be read: {one_line(error)}") from error


def _restore(folder: Path, args: Mapping[str, ocp.RestoreArgs]) -> dict[str, Any]:
    """Restores the named tensors; CheckpointError names the first that cannot be."""
    restorer = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    weights = folder / WEIGHTS_FOLDER
    request = ocp.args.PyTreeRestore(
        item=dict.fromkeys(args, 0), restore_args=dict(args), partial_restore=True
    )
    try:
        return restorer.restore(weights, args=request)  # type: ignore[arg-type]
    except Exception as error:
        # Orbax's messages do not tell which tensor it was: find it by reading one at a time.
        for name in args:
            _read(folder, name)
        raise CheckpointError(f"{weights}: cannot be read: {one_line(error)}") from error


def load_weights(
    folder: str | Path | Manifest,
    *,
    dtype: Any = None,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> Weights:
    """Loads a checkpoint's tensors as jax.Arrays.

    Args:
        folder: a checkpoint, or its manifest.
        dtype: cast to this while reading; None keeps the stored dtype.
        shardings: where each tensor goes; each device's shard is read on its own. A tensor without
            one goes to the default device.

    Returns:
        The flat dict of a full module, or for a LoRA decode module of its factors.

    Raises:
        CheckpointError: as `read_manifest`, or a tensor's file is missing, damaged or misshapen.
    """
    manifest = folder if isinstance(folder, Manifest) else read_manifest(folder)
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = np.dtype(dtype or DTYPES[manifest.dtype])
    weights: Weights = {}
    group: dict[str, ocp.RestoreArgs] = {}
    size = 0
    for name, entry in manifest.tensors.items():
        group[name] = ocp.ArrayRestoreArgs(
            restore_type=jax.Array,
            dtype=target,  # type: ignore[arg-type]
            sharding=(shardings or {}).get(name, default),
        )
        size += int(np.prod(entry.shape)) * target.itemsize
        if size >= RESTORE_BYTES:
            weights |= _restore(manifest.folder, group)
            group, size = {}, 0
    if group:
        weights |= _restore(manifest.folder, group)
    for name, entry in manifest.tensors.items():
        if tuple(weights[name].shape) != entry.shape:
            raise CheckpointError(
                f"{manifest.folder / WEIGHTS_FOLDER}: tensor {name} has shape "
                f"{list(weights[name].shape)} in the file, {list(entry.shape)} by the manifest"
            )
    return weights


def open_weights(folder: str | Path | Manifest) -> dict[str, LazyTensor]:
    """A checkpoint's tensors as LazyTensors: numpy arrays, read one at a time.

    Raises:
        CheckpointError: as `read_manifest`; and `read()` of a tensor whose file is missing or
            damaged.
    """
    manifest = folder if isinstance(folder, Manifest) else read_manifest(folder)

    return {
        name: LazyTensor(entry.shape, DTYPES[entry.dtype], partial(_read, manifest.folder, name))
        for name, entry in manifest.tensors.items()
    }
