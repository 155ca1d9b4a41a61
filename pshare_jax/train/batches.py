"""The order of training: which examples make up each step, the same on every machine and resume.

Grain shuffles and prefetches; everything is a function of the seed and the rows, so the state of
the pipeline is one number, the index of the next micro-batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import grain
import numpy as np

from pshare_jax.train.buckets import Bucket
from pshare_jax.train.layout import Batch, Row, collate

_READ_AHEAD = 4


class MicroBatch(NamedTuple):
    """Rows of one bucket that go through the model together; at most the micro-batch size."""

    bucket: Bucket
    rows: tuple[int, ...]


Step = list[MicroBatch]
"""The micro-batches of one optimizer step."""


def epoch_orders(num_rows: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """A permutation of the rows for each epoch."""
    for epoch in range(epochs):
        yield _epoch_order(num_rows, epoch, seed)


@functools.lru_cache(maxsize=4)
def _epoch_order(num_rows: int, epoch: int, seed: int) -> np.ndarray:
    """Kept: of few rows, grain takes most of a millisecond for each."""
    order = grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat(epoch + 1)
    indices = np.asarray([order[i] for i in range(epoch * num_rows, (epoch + 1) * num_rows)])
    indices.flags.writeable = False
    return indices


def fill_micro_batches(
    order: Sequence[int] | np.ndarray,
    buckets: Sequence[Bucket],
    assigned: np.ndarray,
    size: int,
) -> list[MicroBatch]:
    """Cuts `order` into micro-batches of one bucket each, in the order in which they fill up.

    Every row is in exactly one; the last of each bucket may be smaller than `size`.
    """
    batches: list[MicroBatch] = []
    filling: dict[int, list[int]] = {}
    for row in order:
        bucket = int(assigned[row])
        members = filling.setdefault(bucket, [])
        members.append(int(row))
        if len(members) == size:
            batches.append(MicroBatch(buckets[bucket], tuple(filling.pop(bucket))))
    batches += [MicroBatch(buckets[bucket], tuple(rows)) for bucket, rows in filling.items()]
    return batches


def group_steps(micro: Sequence[MicroBatch], batch_size: int) -> list[Step]:
    """Steps of `batch_size` rows each; the last has what is left.

    What remains of each bucket at the end of an epoch is no step of its own, which would change the
    weights as much as a whole one: such micro-batches share a step, and one is cut where it holds
    more than a step lacks.
    """
    steps: list[Step] = []
    lacking = 0
    for batch in micro:
        rows = batch.rows
        while rows:
            if not lacking:
                steps.append([])
                lacking = batch_size
            part, rows = rows[:lacking], rows[lacking:]
            steps[-1].append(MicroBatch(batch.bucket, part))
            lacking -= len(part)
    return steps


@dataclass(frozen=True)
class Plan:
    """Every step of a run.

    Args:
        steps: micro-batches of each.
        steps_per_epoch: how many steps an epoch has.
    """

    steps: list[Step]
    steps_per_epoch: int

    def first_micro_batch(self, step: int) -> int:
        """The index, over all steps, of the first micro-batch of `step`."""
        return sum(len(s) for s in self.steps[:step])


def make_plan(
    buckets: Sequence[Bucket],
    assigned: np.ndarray,
    *,
    micro_batch_size: int,
    batch_size: int,
    epochs: int,
    max_steps: int,
    seed: int,
) -> Plan:
    """Plans a run over rows with the buckets `assigned`.

    Args:
        buckets: the shapes.
        assigned: index of each row's bucket.
        micro_batch_size: most rows of a micro-batch.
        batch_size: rows of a step; the last step of an epoch may have fewer.
        epochs: passes over the rows.
        max_steps: most steps in all; 0 for no limit.
        seed: of the shuffling.
    """
    steps: list[Step] = []
    per_epoch = 0
    for order in epoch_orders(len(assigned), epochs, seed):
        micro = fill_micro_batches(order, buckets, assigned, micro_batch_size)
        epoch = group_steps(micro, batch_size)
        per_epoch = per_epoch or len(epoch)
        steps += epoch
        if max_steps and len(steps) >= max_steps:
            break
    return Plan(steps[:max_steps] if max_steps else steps, per_epoch)


class _Source:
    """Collated micro-batches by index, for grain."""

    def __init__(self, micro: list[MicroBatch], make: Callable[[MicroBatch], Batch]):
        self._micro = micro
        self._make = make

    def __len__(self) -> int:
        return len(self._micro)

    def __getitem__(self, index: int) -> Batch:
        return self._make(self._micro[index])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._micro)} micro-batches)"


class BatchStream:
    """The micro-batches of a plan in order, collated in background threads.

    Args:
        plan: the run.
        rows: all rows.
        size: rows of a micro-batch; smaller ones are padded.
        teacher: see `layout.collate`.
        load_kv: gives the kept KV of a micro-batch, see `kv_store`; None when it is not kept.
    """

    def __init__(
        self,
        plan: Plan,
        rows: Sequence[Row],
        size: int,
        *,
        teacher: bool,
        load_kv: Callable[[MicroBatch], np.ndarray] | None,
    ):
        def make(micro: MicroBatch) -> Batch:
            members = [rows[i] for i in micro.rows]
            batch = collate(members, micro.bucket, size, teacher=teacher)
            if load_kv is not None:
                batch["kv"] = load_kv(micro)
            return batch

        micro = [batch for step in plan.steps for batch in step]
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=_READ_AHEAD)
        source = grain.MapDataset.source(_Source(micro, make))
        self._iterator = iter(source.to_iter_dataset(options))

    def seek(self, index: int) -> None:
        """Makes `index` the next micro-batch."""
        self._iterator.set_state({"next_index": index})

    def __next__(self) -> Batch:
        return next(self._iterator)
