"""A prefill worker's end of the store: between the pool of its mesh and the store's threads."""

# pyright: standard
# JAX does not say all of its types.

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from pshare_jax.core import messages as m
from pshare_jax.core.buckets import TRANSFER_BUCKETS, pieces
from pshare_jax.core.plans import Commit, Load, Look, Save, StorePlan
from pshare_jax.kv.store.service import Batch, StoreService
from pshare_jax.runtime.pool import PagePool, Pages
from pshare_jax.runtime.programs import Programs


class WorkerEnd:
    """Carries out store plans. `run` belongs to the thread that owns the pool.

    Args:
        programs: of the worker's mesh.
        pool: its pages.
        service: the store.
        root: of the store's keys: what their contents depend on beside tokens and weights.
        send: carries a message to the worker, from any thread.
    """

    def __init__(
        self,
        programs: Programs,
        pool: PagePool,
        service: StoreService,
        root: bytes,
        send: Callable[[m.Message], None],
    ):
        self._programs = programs
        self._pool = pool
        self._service = service
        self._root = root
        self.send = send
        # Written by the store's threads, taken and dropped by the worker's.
        self._staged: dict[int, list[np.ndarray]] = {}
        self._wanted: set[int] = set()

    @property
    def num_staged(self) -> int:
        """Loads that lie in the host's memory, or are on their way there."""
        return len(self._staged) + len(self._wanted)

    def run(self, plan: StorePlan) -> None:
        """See `StoreEnd.run`."""
        for transfer in plan.dropped:
            self._wanted.discard(transfer)
            self._staged.pop(transfer, None)
        for look in plan.looks:
            self._look(look)
        for load in plan.loads:
            self._load(load)
        for commit in plan.commits:
            self._commit(commit)
        if plan.saves:
            self._save(plan.saves)
        if plan.touched:
            self._touch(plan.touched)

    def store_keys(self, keys: Sequence[bytes]) -> list[bytes]:
        """The store's keys of pages."""
        return [hashlib.blake2b(key, digest_size=16, key=self._root).digest() for key in keys]

    def _look(self, look: Look) -> None:
        self._service.look(
            self.store_keys(look.keys),
            lambda places: self.send(m.Looked(look.id, places)),
            ahead=look.ahead,
        )

    def _load(self, load: Load) -> None:
        transfer = load.transfer
        self._wanted.add(transfer)

        def answer(found: list[np.ndarray] | str) -> None:
            self._wanted.discard(transfer)
            if isinstance(found, str):
                self.send(m.Loaded(transfer, found))
            else:
                # If it is not wanted any more, the core says so once more when it hears of it.
                self._staged[transfer] = found
                self.send(m.Loaded(transfer))

        keys = self.store_keys(load.keys)
        self._service.load(load, keys, lambda: transfer in self._wanted, answer)

    def _commit(self, commit: Commit) -> None:
        start = 0
        for piece in self._staged.pop(commit.transfer):
            count = piece.shape[1]
            indices = _padded(commit.pages[start : start + count], count)
            start += count
            staged = jax.device_put(piece, self._programs.staging)

            def scatter(
                pages: Pages, staged: jax.Array = staged, indices: np.ndarray = indices
            ) -> tuple[Pages, None]:
                return self._programs.scatter(pages, staged, indices), None

            self._pool.update(scatter)

    def _save(self, saves: Sequence[Save]) -> None:
        batches, start = [], 0
        for length, bucket in pieces(len(saves), TRANSFER_BUCKETS):
            chosen = saves[start : start + length]
            start += length
            indices = _padded([save.page for save in chosen], bucket)
            staged = self._pool.read(
                lambda pages, indices=indices: self._programs.gather(pages, indices)
            )
            keys = self.store_keys([save.key for save in chosen])
            batches.append(Batch(staged, keys, [save.tokens for save in chosen]))
        done = [save.key for save in saves]
        names = dict(zip(self.store_keys(done), done, strict=True))
        self._service.save(
            batches,
            lambda kept: self.send(m.Stored(done, [names[key] for key in kept], [])),
        )

    def _touch(self, keys: Sequence[bytes]) -> None:
        def answer(gone: list[int]) -> None:
            if gone:
                self.send(m.Stored([], [], [keys[i] for i in gone]))

        self._service.touch(self.store_keys(keys), answer)


def _padded(pages: list[int], bucket: int) -> np.ndarray:
    """int32 page numbers, padded with the padding page 0 to length `bucket`."""
    indices = np.zeros(bucket, np.int32)
    indices[: len(pages)] = pages
    return indices
