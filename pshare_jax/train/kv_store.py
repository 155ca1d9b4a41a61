"""The frozen prefill module's KV of all rows, computed once and kept in memory or in a file.

It cannot change while a decode module trains, so that epochs after the first, and every restart of
an evaluation, need not compute it again. Rows are always computed in the same batches, whatever
the order of training: a resumed run reads the same bits.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from pshare_jax.convert.files import check_space
from pshare_jax.models.config import ModelConfig
from pshare_jax.train.batches import MicroBatch, fill_micro_batches
from pshare_jax.train.config import KVCacheConfig
from pshare_jax.train.layout import Bucket, Row, collate

_GB = 1e9

ComputeKV = Callable[[np.ndarray], np.ndarray]
"""From `prompt [B, P]` int32 to its KV on the host, as `loss.base_kv` gives it."""


class KVStore:
    """KV of each row's prompt, at its own length.

    Args:
        config: the architecture.
        rows: all rows.
        dtype: dtype name of the KV.
        file: where it is kept; None keeps it in memory.
    """

    def __init__(self, config: ModelConfig, rows: Sequence[Row], dtype: str, file: Path | None):
        lengths = [len(row.prompt) for row in rows]
        self._offsets = np.concatenate([[0], np.cumsum(lengths)])
        token = (config.num_layers, 2, config.num_kv_heads, config.head_dim)
        shape = (int(self._offsets[-1]), *token)
        self._dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
        if file is None:
            self._kv = np.empty(shape, self._dtype)
        else:
            # numpy's files know no bfloat16; bytes of the same size do.
            raw = np.memmap(file, np.dtype(f"V{self._dtype.itemsize}"), "w+", shape=shape)
            self._kv = raw.view(self._dtype)
        self.batch_seconds: float | None = None
        """Median time to compute the KV of a batch, once compiled; None when that never was."""

    def fill(
        self,
        rows: Sequence[Row],
        buckets: Sequence[Bucket],
        assigned: np.ndarray,
        size: int,
        compute: ComputeKV,
        report: Callable[[int], None],
    ) -> None:
        """Computes the KV of all rows, `size` at a time; `report` gets the number of rows done."""
        seen: set[Bucket] = set()
        times: list[float] = []
        for micro in fill_micro_batches(np.arange(len(rows)), buckets, assigned, size):
            members = [rows[i] for i in micro.rows]
            batch = collate(members, micro.bucket, size, teacher=False)
            if micro.bucket.prompt:
                start = time.perf_counter()
                kv = compute(batch["prompt"])
                if micro.bucket in seen:
                    times.append(time.perf_counter() - start)
                seen.add(micro.bucket)
                for i, row in enumerate(micro.rows):
                    begin, end = self._offsets[row : row + 2]
                    self._kv[begin:end] = kv[i, : end - begin]
            report(len(micro.rows))
        self.batch_seconds = float(np.median(times)) if times else None

    def load(self, micro: MicroBatch, size: int) -> np.ndarray:
        """KV of a micro-batch, padded with zeros to its bucket and to `size` rows:
        `[B, P, layers, 2, kv_heads, head_dim]`."""
        out = np.zeros((size, micro.bucket.prompt, *self._kv.shape[1:]), self._dtype)
        for i, row in enumerate(micro.rows):
            begin, end = self._offsets[row : row + 2]
            out[i, : end - begin] = self._kv[begin:end]
        return out


def kv_bytes(config: ModelConfig, rows: Sequence[Row], dtype: str) -> int:
    """Size of the KV of all rows' prompts in bytes."""
    itemsize = np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    return token * sum(len(row.prompt) for row in rows)


def open_store(
    config: ModelConfig, rows: Sequence[Row], dtype: str, budget: KVCacheConfig, folder: Path
) -> tuple[KVStore | None, str]:
    """A store for `rows` in memory or in a file of `folder`, whichever budget it fits.

    Returns:
        The empty store, or None when no budget is large enough or there is nothing to keep; and
        one line that says so.

    Raises:
        CheckpointError: the disk has less space than is needed and allowed.
    """
    needed = kv_bytes(config, rows, dtype)
    if not needed:
        return None, "no prompt is read from the prefill module's KV"
    size = f"{needed / _GB:.3g} GB of KV"
    if needed <= budget.memory_gb * _GB:
        return KVStore(config, rows, dtype, None), f"{size} kept in memory"
    if needed <= budget.disk_gb * _GB:
        folder.mkdir(parents=True, exist_ok=True)
        check_space(folder, needed)
        # The file is unlinked when closed, also when the process is killed.
        with tempfile.NamedTemporaryFile(dir=folder, prefix="kv-", suffix=".bin") as file:
            return KVStore(config, rows, dtype, Path(file.name)), f"{size} kept on disk"
    return None, (
        f"{size} computed anew for each batch: more than kv_cache.memory_gb and kv_cache.disk_gb"
    )
