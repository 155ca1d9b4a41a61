"""Writing a checkpoint's tensors by orbax. Of the conversions' files only this one knows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from pshare_jax.convert.tensors import LazyTensor
from pshare_jax.convert.zarr import write_tensor
from pshare_jax.errors import CheckpointError


class _LazyTensorHandler(type_handlers.NumpyHandler):
    """Lets orbax save LazyTensors: one is read, written and forgotten before the next.

    Orbax's own handlers want all arrays at once and cannot be given the chunk axis.
    """

    def __init__(
        self,
        dest: Path,
        chunks: Mapping[str, Sequence[int]],
        done: Callable[[str, np.ndarray], None],
    ):
        super().__init__()
        self._dest = dest
        self._chunks = chunks
        self._done = done

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> list[Any]:
        del args
        for tensor, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            array = np.ascontiguousarray(tensor.read())
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise CheckpointError(
                    f"tensor {info.name}: read as {array.dtype}{list(array.shape)}, "
                    f"announced as {tensor.dtype}{list(tensor.shape)}"
                )
            try:
                write_tensor(info.parent_dir / info.name, array, self._chunks[info.name])
            except CheckpointError as error:
                raise CheckpointError(f"{self._dest}: {error}") from error
            self._done(info.name, array)
            # Not held while the next is read.
            del array
        return []


def save(
    folder: Path,
    dest: Path,
    tensors: Mapping[str, LazyTensor],
    chunks: Mapping[str, Sequence[int]],
    done: Callable[[str, np.ndarray], None],
) -> None:
    """Writes `tensors` as an orbax checkpoint of one flat dict.

    Args:
        folder: which is there and empty.
        dest: what it will be called, for messages.
        tensors: by name; read one at a time.
        chunks: the shape of each one's chunks.
        done: gets each name and its values once they are written.

    Raises:
        CheckpointError: one could not be read or written.
    """
    # Orbax warns about a registry without jax.Array, though none is saved here.
    registry = type_handlers.create_type_handler_registry(
        (LazyTensor, _LazyTensorHandler(dest, chunks, done)),
        (jax.Array, type_handlers.ArrayHandler(array_metadata_store=None)),
    )
    saver = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=True, type_handler_registry=registry
    )
    saver.save(folder, args=ocp.args.PyTreeSave(dict(tensors)))  # type: ignore[arg-type]
