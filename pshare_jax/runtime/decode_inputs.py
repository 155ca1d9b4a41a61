"""What a decode worker sends to its device: rows of sequences as padded host arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pshare_jax.config import SharedPrefix
from pshare_jax.core.plans import Admit, Step
from pshare_jax.core.shared_runs import LEAST_SHARE, RunSharing, SharedRuns, max_groups
from pshare_jax.kernels.shared_prefix_attention.api import READS_RUNS_ONCE, WORTHWHILE
from pshare_jax.runtime.host_arrays import host_array, padded
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.runtime.sampler import pack_rows
from pshare_jax.runtime.steps import Choice, DecodeInput, Rows, Runs, StepSpec

_NO_RUNS = SharedRuns((), (), 0, 0)


class DecodeInputs:
    """Makes the arguments of one worker's steps.

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

    def rows(
        self,
        pages: Sequence[list[int]],
        start: Sequence[int],
        lens: Sequence[int],
        batch: int,
    ) -> Rows:
        """Page tables, starts and lengths, filled up to `batch` rows without tokens."""
        pad = [0] * (batch - len(start))
        return Rows(
            padded(pages, (batch, self._table_width)),
            host_array([*start, *pad], np.int32),
            host_array([*lens, *pad], np.int32),
        )

    def decode(self, step: Step, slots: dict[int, Admit]) -> tuple[DecodeInput, SharedRuns]:
        """One dispatch, and what it reads of the pool; without sharing the latter is empty.

        Args:
            step: the rows.
            slots: what is known of the sequence in each slot.
        """
        inputs = self._plain(step, [slots[row.slot] for row in step.rows])
        groups = max_groups(step.bucket)
        if self._sharing is None or not groups:
            return inputs, _NO_RUNS
        found = self._sharing.find(
            step.group,
            [row.id for row in step.rows],
            np.asarray(inputs.rows.page_table)[: len(step.rows)],
            [row.start for row in step.rows],
            groups,
        )
        if found.members:
            inputs = inputs._replace(runs=self._runs(found, step.bucket))
        return inputs, found

    @staticmethod
    def deferred(inputs: DecodeInput) -> DecodeInput:
        """The same step without the choice of tokens."""
        return inputs._replace(sampling=inputs.sampling.later())

    @staticmethod
    def choice(inputs: DecodeInput, mask: NDArray[np.uint32]) -> Choice:
        """How the tokens of such a step are chosen, with the mask of its rows."""
        rows = inputs.rows
        mask_on_device = host_array(mask, np.uint32)
        return Choice(mask_on_device, inputs.slots, rows.start, rows.lens, inputs.sampling)

    def warm_up(self, bucket: int) -> Iterator[DecodeInput]:
        """One dispatch without sequences for each executable that `decode` may ask for."""
        inputs = self._plain(Step("", bucket, 1, []), [])
        yield inputs
        if self._sharing is not None and max_groups(bucket):
            yield inputs._replace(runs=self._runs(_NO_RUNS, bucket))

    def _plain(self, step: Step, known: list[Admit]) -> DecodeInput:
        rows, bucket = step.rows, step.bucket
        pad = bucket - len(rows)
        return DecodeInput(
            rows=self.rows(
                [row.pages for row in rows],
                [row.start for row in rows],
                [1] * len(rows),
                bucket,
            ),
            slots=host_array([row.slot for row in rows] + [self._spare_slot] * pad, np.int32),
            adapter_index=host_array([row.adapter for row in rows] + [-1] * pad, np.int32),
            sampling=pack_rows(
                [admit.params for admit in known],
                [admit.seed for admit in known],
                [admit.prompt_len for admit in known],
                bucket,
            ),
            num_steps=host_array(step.count, np.int32),
        )

    def _runs(self, found: SharedRuns, bucket: int) -> Runs:
        groups = max_groups(bucket)
        members = np.full((groups, bucket), bucket, np.int32)
        lens = np.zeros(groups, np.int32)
        for e, (rows, pages) in enumerate(zip(found.members, found.pages, strict=True)):
            members[e, : len(rows)] = rows
            lens[e] = pages * self._page_size
        return Runs(host_array(members, np.int32), host_array(lens, np.int32))
