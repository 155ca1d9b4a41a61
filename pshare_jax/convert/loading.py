"""Tensors of a checkpoint onto devices: as fast as can be, or beside threads that serve.

Beside them one tensor is read at a time, by what they leave of a core.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from pshare_jax.convert.manifest import TENSORS_FILE, WEIGHTS_FOLDER, Manifest, TensorEntry
from pshare_jax.convert.tensors import NARROW, STORED_DTYPES
from pshare_jax.convert.zarr import CHECKED, StoredTensor
from pshare_jax.errors import CheckpointError
from pshare_jax.kernels.native.library import load_library
from pshare_jax.kernels.native.loading import BESIDE_OTHERS, aligned, give_way, read_tensor
from pshare_jax.models.weights import Weights


def open_tensor(
    manifest: Manifest, name: str, dtype: np.dtype | None = None, *, gentle: bool = False
) -> StoredTensor:
    """Opens a tensor of a checkpoint with tensorstore; arguments as of `StoredTensor`.

    Raises:
        CheckpointError: it is not there, or not what the manifest says.
    """
    entry = manifest.tensors[name]
    stored = StoredTensor(manifest.folder / WEIGHTS_FOLDER, name, dtype, gentle=gentle)
    pairs = {
        "shape": (list(stored.shape), list(entry.shape)),
        "dtype": (stored.stored_dtype, entry.dtype),
    }
    for what, (found, expected) in pairs.items():
        if found != expected:
            raise CheckpointError(
                f"{manifest.folder / WEIGHTS_FOLDER / name}: has {what} {found}, but "
                f"{TENSORS_FILE} says {expected}"
            )
    return stored


def load_group(
    manifest: Manifest,
    names: Sequence[str],
    dtypes: Mapping[str, np.dtype],
    shardings: Mapping[str, Sharding],
) -> Weights:
    """Loads some tensors: all reads are started before the first is waited for."""
    started = []
    for name in names:
        shape = manifest.tensors[name].shape
        stored = open_tensor(manifest, name, dtypes[name])
        indices = shardings[name].addressable_devices_indices_map(shape)
        # Replicas share one read.
        parts = {str(index): index for index in indices.values()}
        reads = {key: stored.read(index or ()) for key, index in parts.items()}
        started.append((name, indices, reads))
    weights: Weights = {}
    for name, indices, reads in started:
        values = {key: reads.pop(key)() for key in list(reads)}
        weights[name] = _assembled(manifest, name, shardings[name], indices, values)
    return weights


def load_gently(
    manifest: Manifest,
    names: Sequence[str],
    dtypes: Mapping[str, np.dtype],
    shardings: Mapping[str, Sharding],
) -> Weights:
    """Loads some tensors as `load_group` does, but each after the one before is on its devices."""
    weights: Weights = {}
    folder = manifest.folder / WEIGHTS_FOLDER
    for name in names:
        give_way()
        entry, dtype = manifest.tensors[name], dtypes[name]
        opened = partial(open_tensor, manifest, name, dtype, gentle=True)
        indices = shardings[name].addressable_devices_indices_map(entry.shape)
        parts = {str(index): index for index in indices.values()}
        values = {
            key: _read_gently(folder, name, entry, dtype, opened, index or ())
            for key, index in parts.items()
        }
        loaded = _assembled(manifest, name, shardings[name], indices, values)
        weights[name] = jax.block_until_ready(loaded)
    return weights


def _assembled(
    manifest: Manifest,
    name: str,
    sharding: Sharding,
    indices: Mapping[Any, Any],
    values: Mapping[str, np.ndarray],
) -> jax.Array:
    """A tensor of the parts that its devices have."""
    shards = [jax.device_put(values[str(index)], device) for device, index in indices.items()]
    return jax.make_array_from_single_device_arrays(manifest.tensors[name].shape, sharding, shards)


def _read_gently(
    weights: Path,
    name: str,
    entry: TensorEntry,
    dtype: np.dtype,
    open: Callable[[], StoredTensor],
    index: tuple[slice, ...] = (),
) -> np.ndarray:
    """A stored tensor or a part of it, read now.

    A whole one is read by C++ in a thread of a lower priority. A part, or what was not written
    by this package, or a damaged file is left to tensorstore, which says what is wrong with it.

    Args:
        weights: the folder of a checkpoint's tensors.
        name: of the tensor.
        entry: its shape and stored dtype.
        dtype: of the result.
        open: opens it with tensorstore, cast to that dtype.
        index: the part; by default all.

    Raises:
        CheckpointError: it is missing, damaged or misshapen.
    """
    parts = zip(index, entry.shape, strict=False)
    if all(part.indices(size) == (0, size, 1) for part, size in parts):
        array = _read_whole(weights / name, entry, dtype)
        if array is not None:
            return array
    return open().read(index)()


def _read_whole(path: Path, entry: TensorEntry, dtype: np.dtype) -> np.ndarray | None:
    library = load_library()
    stored_as = STORED_DTYPES[entry.dtype]
    if library is None or dtype not in STORED_DTYPES.values():
        return None
    if dtype != stored_as and {dtype, stored_as} & set(NARROW):
        return None
    try:
        about = json.loads((path / "zarr.json").read_bytes())
        layout = _layout(about)
        stored = tuple(about["shape"]), about["data_type"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if layout is None or stored != (entry.shape, entry.dtype):
        return None
    out = aligned(entry.shape, dtype)
    file = path.joinpath("c", *["0"] * len(entry.shape))
    whole = read_tensor(library, file, layout, stored_as, out, BESIDE_OTHERS)
    return out if whole else None


def _layout(about: dict[str, Any]) -> tuple[int, int, int] | None:
    """Rows, chunks and run of a tensor, see `loading.read_tensor`, if `zarr` has written it."""
    shape = about["shape"]
    codec = about["codecs"][0]["configuration"]
    inner = codec["chunk_shape"]
    written = (
        len(about["codecs"]) == 1
        and about["codecs"][0]["name"] == "sharding_indexed"
        and codec == {"chunk_shape": inner, "codecs": CHECKED, "index_codecs": CHECKED}
        and about["chunk_grid"] == {"name": "regular", "configuration": {"chunk_shape": shape}}
        and about["chunk_key_encoding"] == {"name": "default"}
    )
    cut = [axis for axis, (n, part) in enumerate(zip(shape, inner, strict=True)) if n != part]
    if not written or not shape or len(cut) > 1 or math.prod(shape) == 0:
        return None
    axis = cut[0] if cut else 0
    if shape[axis] % inner[axis]:
        return None
    return math.prod(shape[:axis]), shape[axis] // inner[axis], math.prod(inner[axis:])
