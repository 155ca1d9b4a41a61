"""The training loop: steps, evaluations, checkpoints, and the decode module at the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pshare_jax.errors import CheckpointError
from pshare_jax.runtime.host_memory import return_freed_memory
from pshare_jax.train.batches import BatchStream, MicroBatch
from pshare_jax.train.checkpoint import Checkpoints, TrainState
from pshare_jax.train.config import TrainConfig, with_rate
from pshare_jax.train.job import Job, prepare
from pshare_jax.train.layout import collate
from pshare_jax.train.memory import check_memory
from pshare_jax.train.meter import TITLE, Meter, summary
from pshare_jax.train.output import finished_record, write_module
from pshare_jax.train.report import MetricsLog, Reporter
from pshare_jax.train.step import Gradients, Update

CHECKPOINT_FOLDER = "checkpoints"


class StopRequestedError(Exception):
    """The run was asked to stop after `step` steps; its newest checkpoint is that of `saved`."""

    def __init__(self, step: int, saved: int | None):
        rest = "to go on" if saved == step else f"to go on after step {saved or 0}"
        super().__init__(f"stopped after step {step}; start again {rest}")
        self.step = step


def train(
    config: TrainConfig,
    reporter: Reporter,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Runs, or goes on with, the training that `config` describes; JAX has been started.

    Args:
        config: checked by `check_config`.
        reporter: tells the user.
        should_stop: asked after each step.

    Returns:
        The training record that lies in the decode module.

    Raises:
        ConfigError, DataError, CheckpointError: something that cannot be used, by name.
        MissingExtraError: `report.wandb` without the extra.
        TrainingError: the loss is not finite.
        StopRequestedError: `should_stop` said so.
    """
    config = with_rate(config)
    if (record := finished_record(config)) is not None:
        reporter.say(
            f"{config.output}: finished already; raise optimizer.epochs or optimizer.max_steps to "
            "go on, or remove the folder to train again"
        )
        return record
    job = prepare(config, reporter)
    check_memory(job, reporter.say)
    folder = config.folder
    with contextlib.ExitStack() as stack:
        stack.callback(reporter.stop)
        checkpoints = Checkpoints(folder / CHECKPOINT_FOLDER, config.checkpoint.keep, reporter.say)
        stack.callback(checkpoints.close)
        state = TrainState(job.trainable, job.computations.init_optimizer(job.trainable))
        restored = checkpoints.restore(state)
        step = 0
        if restored is not None:
            step, state = restored.step, restored.state
            reporter.say(f"{config.output}: going on after step {step}")
        elif any("steps" in before for before in job.identity.get("extended", [])):
            raise CheckpointError(
                f"{config.output}: was finished, but the checkpoint of its last step is gone, so "
                "it cannot be made longer; choose another output, with init naming its module"
            )
        log = None
        if jax.process_index() == 0:
            log = MetricsLog(folder, step + 1, config.report, reporter.say, job.identity)
            stack.callback(log.close)
        run = _Run(job, checkpoints, reporter, log, step, state)
        if restored is not None:
            run.eval_loss = restored.eval_loss
        return run.run(should_stop)


class _Run:
    def __init__(
        self,
        job: Job,
        checkpoints: Checkpoints,
        reporter: Reporter,
        log: MetricsLog | None,
        step: int,
        state: TrainState,
    ):
        self._job = job
        self._compute = job.computations
        self._checkpoints = checkpoints
        self._reporter = reporter
        self._log = log
        self._step = step
        self._state = state
        self._meter = Meter(job, reporter, log)
        self._pending: tuple[int, Update] | None = None
        self._total = len(job.plan.steps)
        self.eval_loss: float | None = None
        """Of the weights as they are; None when they have not been evaluated."""

    def run(self, should_stop: Callable[[], bool]) -> dict[str, Any]:
        job = self._job
        stream = BatchStream(
            job.plan,
            job.rows,
            job.config.micro_batch_size,
            teacher=self._compute.recipe.teacher is not None,
            load_kv=self._load_kv if job.store is not None else None,
        )
        stream.seek(job.plan.first_micro_batch(self._step))
        self._reporter.start(TITLE, self._total, self._step)
        start = time.perf_counter()
        self._meter.restart()
        while self._step < self._total:
            self._train_step(stream)
            ending = self._step == self._total
            stopping = should_stop() and not ending
            if ending or self._is_due(job.config.report.eval_every):
                self._evaluate()
            if ending or stopping or self._is_due(job.config.checkpoint.every) or self._is_best():
                self._save()
            if stopping:
                raise StopRequestedError(self._step, self._checkpoints.newest())
        self._flush()
        self._reporter.stop()
        return self._finish(time.perf_counter() - start)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self._step % every == 0

    def _is_best(self) -> bool:
        if self.eval_loss is None:
            return False
        best = self._checkpoints.best_loss()
        return best is None or self.eval_loss < best

    def _load_kv(self, micro: MicroBatch) -> np.ndarray:
        assert self._job.store is not None
        return self._job.store.load(micro, self._job.config.micro_batch_size)

    def _train_step(self, stream: BatchStream) -> None:
        total: Gradients | None = None
        for _ in self._job.plan.steps[self._step]:
            batch = self._compute.put(next(stream))
            kv = self._kv(batch)
            more = self._compute.gradients(self._state.trainable, self._job.frozen, kv, batch)
            total = more if total is None else self._compute.add(total, more)
        assert total is not None
        rate = self._job.rates[self._step]
        trainable, optimizer, update = self._compute.update(*self._state, total, rate)
        self._state = TrainState(trainable, optimizer)
        self._step += 1
        self.eval_loss = None
        # The step before is awaited only now, so that the devices always have the next to do.
        self._flush()
        self._pending = (self._step, update)

    def _kv(self, batch: dict[str, jax.Array]) -> jax.Array | None:
        """The prefill module's KV of a batch: kept, or computed; None when nothing reads it."""
        kv = batch.pop("kv", None)
        prompt = batch.pop("prompt")
        if prompt.shape[1] == 0:
            return None
        if kv is None:
            assert self._job.base_weights is not None
            kv = self._compute.base_kv(self._job.base_weights, prompt)
        return kv

    def _flush(self) -> None:
        """Waits for the step that is still being computed, and reports it."""
        if self._pending is not None:
            (step, update), self._pending = self._pending, None
            self._meter.record(step, update)

    def _evaluate(self) -> None:
        """Mean loss of the evaluation rows; does nothing without any."""
        if not self._job.evaluation:
            return
        self._flush()
        job, size = self._job, self._job.config.micro_batch_size
        loss = count = 0.0
        for micro in job.evaluation:
            rows = [job.rows[row] for row in micro.rows]
            arrays = collate(
                rows, micro.bucket, size, teacher=self._compute.recipe.teacher is not None
            )
            if job.store is not None:
                arrays["kv"] = self._load_kv(micro)
            batch = self._compute.put(arrays)
            kv = self._kv(batch)
            sums = self._compute.loss(self._state.trainable, job.frozen, kv, batch)
            loss, count = loss + float(sums[0]), count + float(sums[1])
        self.eval_loss = loss / count
        if self._log is not None:
            self._log.write(self._step, {"eval_loss": self.eval_loss})
        self._reporter.say(f"step {self._step}: eval loss {self.eval_loss:.4f}")
        self._meter.restart()

    def _save(self) -> None:
        # What is logged must not be behind what is saved.
        self._flush()
        self._checkpoints.save(self._step, self._state, self.eval_loss)
        # Its copies and a step's temporary arrays lay between each other.
        return_freed_memory()
        self._meter.restart()

    def _finish(self, seconds: float) -> dict[str, Any]:
        """Writes the decode module."""
        job, config = self._job, self._job.config
        step, state, eval_loss = self._step, self._state, self.eval_loss
        if config.checkpoint.export == "best":
            best = self._checkpoints.restore_best(self._state)
            if best is not None:
                step, state, eval_loss = best.step, best.state, best.eval_loss
        results = {
            "steps": self._total,
            "exported_step": step,
            "train_loss": self._meter.loss,
            "eval_loss": eval_loss,
            "seconds": seconds,
            "step_seconds": self._meter.step_seconds(),
            "kv_batch_seconds": job.store.batch_seconds if job.store else None,
        }
        weights = {name: self._compute.to_host(array) for name, array in state.trainable.items()}
        for line in summary(job, self._meter.step_seconds()):
            self._reporter.say(line)
        if jax.process_index() != 0:
            return {**job.identity, **results}
        record = write_module(config, job.base, job.rule, weights, job.identity, results)
        self._reporter.say(f"{config.output}: decode module written")
        return record
