"""Figures of each step: loss, speed, utilisation; logged and shown."""

from __future__ import annotations

import time
from collections.abc import Hashable

import numpy as np

from pshare_jax.errors import TrainingError
from pshare_jax.train.flops import measure_peak, row_flops
from pshare_jax.train.job import Job
from pshare_jax.train.report import MetricsLog, Reporter
from pshare_jax.train.step import Update

TITLE = "training"


class Meter:
    """Measures the steps of a run.

    A step's time is that between the ends of two steps in a row, as the devices are kept busy
    across them; `restart` begins anew after anything else.

    Args:
        job: the run.
        reporter: shows each step.
        log: takes each step's figures; None in all processes but one.
    """

    def __init__(self, job: Job, reporter: Reporter, log: MetricsLog | None):
        self._job = job
        self._reporter = reporter
        self._log = log
        self._total = len(job.plan.steps)
        recipe = job.computations.recipe
        self._flops = [row_flops(recipe, row, kv_kept=job.store is not None) for row in job.rows]
        peak = job.config.report.peak_tflops * 1e12 or measure_peak(recipe.dtype, recipe.matmul)
        self._peak = peak * job.computations.mesh.size
        self._seen: set[Hashable] = set()
        self._steady: list[float] = []
        self._end = 0.0
        self.loss: float | None = None
        """Of the last step, in nats a target token; None before the first."""

    def restart(self) -> None:
        """The next step begins now."""
        self._end = time.perf_counter()

    def record(self, step: int, update: Update) -> None:
        """Waits for the results of `step` (counted from 1), logs and shows them.

        Raises:
            TrainingError: the loss is not finite.
        """
        self.loss = float(update.loss)
        now = time.perf_counter()
        seconds, self._end = now - self._end, now
        if not np.isfinite(self.loss):
            raise TrainingError(
                f"{self._job.config.output}: the loss of step {step} is {self.loss}; lower "
                "optimizer.learning_rate, or set optimizer.clip_norm"
            )
        micro_batches = self._job.plan.steps[step - 1]
        shapes: set[Hashable] = {batch.bucket for batch in micro_batches}
        shapes.add(len(micro_batches) > 1)
        if shapes <= self._seen:
            self._steady.append(seconds)
        self._seen |= shapes
        rows = [row for batch in micro_batches for row in batch.rows]
        tokens = sum(len(self._job.rows[row].sequence) for row in rows)
        utilisation = sum(self._flops[row] for row in rows) / seconds / self._peak
        figures = {
            "epoch": step / self._job.plan.steps_per_epoch,
            "loss": self.loss,
            "learning_rate": float(self._job.rates[step - 1]),
            "gradient_norm": float(update.norm),
            "target_tokens": int(update.tokens),
            "tokens_per_second": tokens / seconds,
            "utilisation": utilisation,
            "seconds": seconds,
        }
        if self._log is not None and (
            step % self._job.config.report.log_every == 0 or step == self._total
        ):
            self._log.write(step, figures)
        note = f"loss {self.loss:.4f}  {tokens / seconds:,.0f} tokens/s  {utilisation:.0%} of peak"
        self._reporter.advance(TITLE, step, self._total, note)

    def step_seconds(self) -> float | None:
        """Median time of a step, of those that compiled nothing; None without any."""
        return float(np.median(self._steady)) if self._steady else None


def summary(job: Job, step_seconds: float | None) -> list[str]:
    """Lines on how long a step took, with and without keeping the prefill module's KV."""
    if step_seconds is None:
        return []
    devices = job.computations.mesh.size
    lines = [f"a step took {step_seconds:.3g} s on {devices} device(s), the median"]
    if (store := job.store) is not None and store.batch_seconds is not None:
        optimizer = job.config.optimizer
        added = store.batch_seconds * optimizer.batch_size / job.config.micro_batch_size
        lines.append(
            f"without the kept KV it would take {step_seconds + added:.3g} s: computing a batch's "
            f"KV took {added:.3g} s"
        )
    return lines
