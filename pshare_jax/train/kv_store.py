"""The frozen prefill module's KV of all rows, computed once and kept in memory or in a file.

It cannot change while a decode module trains, so that epochs after the first, and every restart of
an evaluation, need not compute it again; nor need later runs on the same base and examples, when
the file stays. A run computes the rows that it needs and that are missing, sorted: a resumed run
reads the same bits.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import ml_dtypes
import numpy as np

from pshare_jax.convert.files import check_space, one_line, replace_file
from pshare_jax.convert.manifest import read_json
from pshare_jax.errors import CheckpointError
from pshare_jax.models.config import ModelConfig
from pshare_jax.train.batches import MicroBatch, fill_micro_batches
from pshare_jax.train.buckets import Bucket
from pshare_jax.train.config import KVCacheConfig
from pshare_jax.train.layout import Row, collate

_GB = 1e9
# A run that is killed loses the work of fewer batches than this.
_BATCHES_BETWEEN_RECORDS = 64

ComputeKV = Callable[[np.ndarray], np.ndarray]
"""From `prompt [B, P]` int32 to its KV on the host, as `loss.base_kv` gives it."""


class KVStore:
    """KV of each row's prompt, at its own length.

    Args:
        config: the architecture.
        rows: all rows.
        dtype: dtype name of the KV.
        file: where it is kept, of `kv_bytes` bytes; None keeps it in memory.
        progress: a JSON file that says which rows of `file` earlier runs have filled; None when
            `file` does not stay.
        lock: an open file that is closed once all is filled, to let other runs in.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: Sequence[Row],
        dtype: str,
        file: Path | None,
        progress: Path | None = None,
        lock: IO[bytes] | None = None,
    ):
        lengths = [len(row.prompt) for row in rows]
        self._offsets = np.concatenate([[0], np.cumsum(lengths)])
        token = (config.num_layers, 2, config.num_kv_heads, config.head_dim)
        shape = (int(self._offsets[-1]), *token)
        self._dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
        if file is None:
            self._kv = np.empty(shape, self._dtype)
        else:
            # numpy's files know no bfloat16; bytes of the same size do.
            raw = np.memmap(file, np.dtype(f"V{self._dtype.itemsize}"), "r+", shape=shape)
            self._kv = raw.view(self._dtype)
        self._progress = progress
        self._lock = lock
        self._rows = rows
        self._filled = np.zeros(len(rows), bool)
        self.batch_seconds: float | None = None
        """Median time to compute the KV of a batch, once compiled; None when that never was."""
        if progress is not None and progress.is_file():
            before = read_json(progress)
            bits = np.frombuffer(bytes.fromhex(before["filled"]), np.uint8)
            self._filled[:] = np.unpackbits(bits, count=len(rows))
            self.batch_seconds = before["batch_seconds"]

    @property
    def filled(self) -> np.ndarray:
        """Which rows are there, `[rows]` bool."""
        return self._filled.copy()

    def forget(self, rows: np.ndarray) -> None:
        """Takes the rows `rows`, `[rows]` bool, for missing."""
        self._filled &= ~rows

    def fill(
        self,
        needed: np.ndarray,
        buckets: Sequence[Bucket],
        assigned: np.ndarray,
        size: int,
        compute: ComputeKV,
        report: Callable[[int], None],
    ) -> None:
        """Computes the KV of the rows `needed` that are missing, `size` at a time.

        Args:
            needed: row indices, sorted.
            buckets: the rows' shapes.
            assigned: the index of each row's.
            size: rows of a batch.
            compute: gives the KV of a batch.
            report: gets the number of needed rows that are there, now and then.
        """
        missing = needed[~self._filled[needed]]
        report(len(needed) - len(missing))
        try:
            self._fill(fill_micro_batches(missing, buckets, assigned, size), size, compute, report)
        finally:
            self._record()
            if self._lock is not None:
                self._lock.close()

    def _fill(
        self,
        batches: Sequence[MicroBatch],
        size: int,
        compute: ComputeKV,
        report: Callable[[int], None],
    ) -> None:
        seen: set[Bucket] = set()
        times: list[float] = []
        for number, micro in enumerate(batches):
            if micro.bucket.prompt:
                members = [self._rows[i] for i in micro.rows]
                batch = collate(members, micro.bucket, size, teacher=False)
                start = time.perf_counter()
                kv = compute(batch["prompt"])
                if micro.bucket in seen:
                    times.append(time.perf_counter() - start)
                    self.batch_seconds = float(np.median(times))
                seen.add(micro.bucket)
                for i, row in enumerate(micro.rows):
                    begin, end = self._offsets[row : row + 2]
                    self._kv[begin:end] = kv[i, : end - begin]
            self._filled[list(micro.rows)] = True
            if (number + 1) % _BATCHES_BETWEEN_RECORDS == 0:
                self._record()
            report(len(micro.rows))

    def _record(self) -> None:
        """Notes which rows are in the file, once they are."""
        if self._progress is not None:
            assert isinstance(self._kv, np.memmap)
            self._kv.flush()
            filled = np.packbits(self._filled).tobytes().hex()
            facts = {"filled": filled, "batch_seconds": self.batch_seconds}
            replace_file(self._progress, json.dumps(facts))

    def load(self, micro: MicroBatch, size: int) -> np.ndarray:
        """KV of a micro-batch, padded with zeros to its bucket and to `size` rows, and cut where
        its bucket is shorter: `[B, P, layers, 2, kv_heads, head_dim]`."""
        out = np.zeros((size, micro.bucket.prompt, *self._kv.shape[1:]), self._dtype)
        for i, row in enumerate(micro.rows):
            begin, end = self._offsets[row : row + 2]
            length = min(end - begin, micro.bucket.prompt)
            out[i, :length] = self._kv[begin : begin + length]
        return out


def kv_bytes(config: ModelConfig, rows: Sequence[Row], dtype: str) -> int:
    """Size of the KV of all rows' prompts in bytes."""
    itemsize = np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    return token * sum(len(row.prompt) for row in rows)


def store_key(
    base: str, dtype: str, rows: Sequence[Row], buckets: Sequence[Bucket], size: int
) -> str:
    """Names the KV of `rows`: equal for runs that would compute the same bits.

    Args:
        base: the fingerprint of the prefill module.
        dtype: dtype name of the KV.
        rows: all rows.
        buckets: the shapes they are padded to.
        size: rows of a batch.
    """
    facts = [
        base,
        dtype,
        size,
        [bucket.prompt for bucket in buckets],
        [len(r.prompt) for r in rows],
    ]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for row in rows:
        digest.update(row.prompt.tobytes())
    return digest.hexdigest()[:16]


def open_store(
    config: ModelConfig,
    rows: Sequence[Row],
    dtype: str,
    budget: KVCacheConfig,
    folder: Path,
    key: str,
) -> tuple[KVStore | None, str]:
    """A store for `rows` in memory or in a file of `folder`, whichever budget it fits.

    Args:
        config: the architecture.
        rows: all rows.
        dtype: dtype name of the KV.
        budget: how much may be kept where.
        folder: where a file lies.
        key: see `store_key`; names a file that stays.

    Returns:
        The store, to be filled, or None when no budget is large enough or there is nothing to keep;
        and one line that says so.

    Raises:
        CheckpointError: the disk has less space than is needed and allowed, or another run is
            filling the same file.
    """
    needed = kv_bytes(config, rows, dtype)
    if not needed:
        return None, "no prompt is read from the prefill module's KV"
    size = f"{needed / _GB:.3g} GB of KV"
    if needed <= budget.memory_gb * _GB and not budget.keep:
        return KVStore(config, rows, dtype, None), f"{size} kept in memory"
    if needed <= budget.disk_gb * _GB:
        folder.mkdir(parents=True, exist_ok=True)
        if budget.keep:
            file = folder / f"kv-{key}.bin"
            lock = _claim(file, needed)
            store = KVStore(config, rows, dtype, file, file.with_suffix(".json"), lock)
            return store, f"{size} kept in {file}"
        # The file is unlinked when closed, also when the process is killed.
        with tempfile.NamedTemporaryFile(dir=folder, prefix="kv-", suffix=".bin") as temporary:
            _reserve(temporary.fileno(), folder, needed)
            return KVStore(config, rows, dtype, Path(temporary.name)), f"{size} kept on disk"
    return None, (
        f"{size} computed anew for each batch: more than kv_cache.memory_gb and kv_cache.disk_gb"
    )


def _claim(file: Path, size: int) -> IO[bytes]:
    """Makes `file` `size` bytes long, and keeps other runs from filling it while what is returned
    is open."""
    with contextlib.ExitStack() as on_error:
        # Not in append mode, in which a file system without fallocate could not reserve its size.
        lock = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        on_error.callback(lock.close)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"{file}: another run fills it; start when it has, or set kv_cache.keep to false"
            ) from error
        if os.fstat(lock.fileno()).st_size != size:
            # It is new: what was noted of the rows in it was of a file that is gone.
            file.with_suffix(".json").unlink(missing_ok=True)
        _reserve(lock.fileno(), file.parent, size)
        on_error.pop_all()
        return lock


def _reserve(handle: int, folder: Path, size: int) -> None:
    """Takes `size` bytes of the disk for an open file of `folder`: a full disk found out while the
    file is written through memory would end the process without a message."""
    check_space(folder, size - os.fstat(handle).st_blocks * 512)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
        else:  # macOS
            os.ftruncate(handle, size)
    except OSError as error:
        raise CheckpointError(f"{folder}: {size / _GB:.3g} GB of KV: {one_line(error)}") from error
