"""Which rows of a decode worker are computed next: replays of what a row lacks, and steps."""

from __future__ import annotations

from collections.abc import Mapping

from pshare_jax.config import DecodeConfig
from pshare_jax.core.buckets import bucket_for
from pshare_jax.core.decode_rows import DecodeRows
from pshare_jax.core.models import ModelSpec
from pshare_jax.core.plans import Replay, Step, StepRow
from pshare_jax.core.rows import DecodeRow
from pshare_jax.core.scheduling import GroupTurns, next_batch, steps_for
from pshare_jax.core.sequences import Sequence


class StepPlanner:
    """Plans replays and steps, one group of weights at a time.

    Args:
        rows: the sequences that run.
        models: the served models by name; they may change.
        config: batch buckets and limits.
    """

    def __init__(self, rows: DecodeRows, models: Mapping[str, ModelSpec], config: DecodeConfig):
        self._rows = rows
        self._models = models
        self._config = config
        self._group_turns = GroupTurns(config.group_quantum)
        self._under_way = 0
        self._tick = 0

    def ended(self) -> None:
        """The results of a step are known."""
        self._under_way -= 1

    def catch_up(self) -> Replay | None:
        """One chunk of the KV that some row lacks before it can sample."""
        behind = [row for row in self._rows.all() if row.num_replayed > 0]
        for row in sorted(behind, key=lambda row: (row.last_step, row.order)):
            count = min(row.num_replayed, max(self._config.replay_buckets))
            if self._rows.is_running(row) and self._rows.ensure_pages(row, count):
                return self._replay(row, count)
        return None

    def next_step(self) -> Step | None:
        """A step for the first group, in turn, that can get the pages for one."""
        ready: dict[str, list[DecodeRow]] = {}
        for row in self._rows.all():
            if row.num_behind == 1 and row.remaining > 0:
                group = self._models[row.sequence.model].group
                ready.setdefault(group, []).append(row)
        if self._under_way and self._group_turns.is_over(ready):
            return None
        for group in self._group_turns.order(ready):
            rows = next_batch(ready[group], max(self._config.batch_buckets))
            step = self._step(group, rows)
            if step is not None:
                self._group_turns.stepped(group, ready)
                self._under_way += 1
                return step
        return None

    def _replay(self, row: DecodeRow, count: int) -> Replay:
        start, end = row.num_kv, row.num_kv + count
        row.num_kv = end
        self._tick += 1
        row.last_step = self._tick
        spec = self._models[row.sequence.model]
        return Replay(
            row.sequence.id,
            spec.group,
            _adapter(spec, row.sequence),
            row.pages,
            start,
            row.known_tokens(start, end),
            bucket_for(end - start, self._config.replay_buckets),
        )

    def _step(self, group: str, rows: list[DecodeRow]) -> Step | None:
        """None when no row could get the page it needs."""
        masked = any(row.sequence.params.masked for row in rows)
        limit = 1 if masked else self._config.steps_per_dispatch
        count = steps_for([row.remaining for row in rows], limit)
        batch = [
            row
            for row in rows
            if self._rows.is_running(row) and self._rows.ensure_pages(row, count)
        ]
        # A row may have been preempted for the sake of one that came after it in the batch.
        batch = [row for row in batch if self._rows.is_running(row)]
        if not batch:
            return None
        self._tick += 1
        planned: list[StepRow] = []
        for row in batch:
            adapter = _adapter(self._models[row.sequence.model], row.sequence)
            planned.append(StepRow(row.sequence.id, row.slot, adapter, row.pages, row.num_kv))
            row.last_step = self._tick
            row.planned += count
            row.num_kv += count
        return Step(group, bucket_for(len(batch), self._config.batch_buckets), count, planned)


def _adapter(spec: ModelSpec, sequence: Sequence) -> int:
    return spec.adapter if sequence.adapted else -1
