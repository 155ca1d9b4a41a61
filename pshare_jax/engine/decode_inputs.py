"""What a decode engine sends to its device: rows of sequences as padded host arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pshare_jax.cache.layout import PageLayout
from pshare_jax.config import SharedPrefix
from pshare_jax.engine.host_arrays import host_array, padded
from pshare_jax.engine.sampler import pack_rows
from pshare_jax.engine.sequence import Sequence
from pshare_jax.engine.shared_runs import LEAST_SHARE, RunSharing, SharedRuns, max_groups
from pshare_jax.engine.steps import DecodeInput, Rows, Runs, StepSpec
from pshare_jax.kernels.shared_prefix_attention.api import READS_RUNS_ONCE, WORTHWHILE


@dataclass(eq=False)
class DecodeRow:
    """A sequence in an engine; `num_kv` positions of it have KV in `pages`."""

    sequence: Sequence
    slot: int
    pages: list[int]
    num_kv: int
    last_step: int = -1

    @property
    def order(self) -> int:
        """Arrival order."""
        return self.sequence.order

    @property
    def started(self) -> bool:
        """Whether a token of it has been generated, here or before it was preempted."""
        return len(self.sequence.output) > 0

    @property
    def num_behind(self) -> int:
        """Known tokens without KV; the last of them is fed to the step that samples."""
        return self.sequence.num_tokens - self.num_kv


class DecodeInputs:
    """Makes the arguments of one engine's steps.

    Args:
        spare_slot: slot of the rows that fill a batch up.
        layout: page shape.
        max_model_len: most tokens of a sequence.
        spec: model and kernel backend.
        shared_prefix: see `DecodeConfig`.
    """

    def __init__(
        self,
        spare_slot: int,
        layout: PageLayout,
        max_model_len: int,
        spec: StepSpec,
        shared_prefix: SharedPrefix,
    ):
        self._spare_slot = spare_slot
        self._table_width = layout.pages_for(max_model_len)
        self._page_size = layout.page_size
        self._sharing: RunSharing | None = None
        # A backend that falls back to plain attention needs no second executable.
        useful = {"on": READS_RUNS_ONCE, "auto": WORTHWHILE, "off": ()}[shared_prefix]
        if spec.backend in useful:
            least = LEAST_SHARE if shared_prefix == "auto" else 0.0
            self._sharing = RunSharing(layout.page_size, spec.config.sliding_window, least)

    def rows(self, pages: list[list[int]], start: list[int], lens: list[int], batch: int) -> Rows:
        """Page tables, starts and lengths, filled up to `batch` rows without tokens."""
        pad = [0] * (batch - len(start))
        return Rows(
            padded(pages, (batch, self._table_width)),
            host_array(start + pad, np.int32),
            host_array(lens + pad, np.int32),
        )

    def decode(
        self, group: str, batch: list[DecodeRow], bucket: int, steps: int
    ) -> tuple[DecodeInput, SharedRuns]:
        """One dispatch for a batch of the group of models `group`, and what it reads of the pool.

        Without sharing the latter is empty.
        """
        inputs = self._plain(batch, bucket, steps)
        if self._sharing is None or not max_groups(bucket):
            return inputs, SharedRuns((), (), 0, 0)
        found = self._sharing.find(
            group,
            batch,
            np.asarray(inputs.rows.page_table)[: len(batch)],
            [row.num_kv for row in batch],
            max_groups(bucket),
        )
        if found.members:
            inputs = inputs._replace(runs=self._runs(found, bucket))
        return inputs, found

    def warm_up(self, bucket: int) -> Iterator[DecodeInput]:
        """One dispatch without sequences for each executable that `decode` may ask for."""
        inputs = self._plain([], bucket, 1)
        yield inputs
        if self._sharing is not None and max_groups(bucket):
            yield inputs._replace(runs=self._runs(SharedRuns((), (), 0, 0), bucket))

    def _plain(self, batch: list[DecodeRow], bucket: int, steps: int) -> DecodeInput:
        sequences = [row.sequence for row in batch]
        spare = [self._spare_slot] * (bucket - len(batch))
        last = [
            s.known_tokens(row.num_kv, row.num_kv + 1)[0]
            for s, row in zip(sequences, batch, strict=True)
        ]
        pad = [0] * (bucket - len(batch))
        return DecodeInput(
            tokens=host_array(last + pad, np.int32),
            rows=self.rows(
                [row.pages for row in batch],
                [row.num_kv for row in batch],
                [1] * len(batch),
                bucket,
            ),
            slots=host_array([row.slot for row in batch] + spare, np.int32),
            adapter_index=host_array(
                [s.model.adapter for s in sequences] + [-1] * len(pad), np.int32
            ),
            sampling=pack_rows(
                [s.request.params for s in sequences],
                [s.seed for s in sequences],
                [len(s.prompt) for s in sequences],
                bucket,
            ),
            num_steps=host_array(steps, np.int32),
        )

    def _runs(self, found: SharedRuns, bucket: int) -> Runs:
        groups = max_groups(bucket)
        members = np.full((groups, bucket), bucket, np.int32)
        lens = np.zeros(groups, np.int32)
        for e, (rows, pages) in enumerate(zip(found.members, found.pages, strict=True)):
            members[e, : len(rows)] = rows
            lens[e] = pages * self._page_size
        return Runs(host_array(members, np.int32), host_array(lens, np.int32))
