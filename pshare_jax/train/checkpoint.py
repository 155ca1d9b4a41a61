"""Checkpoints of a run: written while training goes on, kept by age and by evaluation, checked.

Of the trainer's files, only this one knows orbax. A checkpoint counts once orbax has committed it,
so a process may be killed at any moment. A list of its files with their checksums is committed with
it, and compared before it is read: orbax itself would not notice a changed value, and leaves reads
in flight behind when a file is cut short.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import PolicyCheckpointInfo, preservation_policy

from pshare_jax.convert.files import check_space, one_line
from pshare_jax.errors import CheckpointError
from pshare_jax.models.weights import Weights

_EVAL = "eval_loss"
_FILES = "files.json"
_BLOCK = 1 << 24
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")

Warn = Callable[[str], None]
"""Gets a message that the user should read."""


class TrainState(NamedTuple):
    """What a step reads and writes: the trained weights and the optimizer's state."""

    trainable: Weights
    optimizer: Any


class Restored(NamedTuple):
    """A checkpoint: the number of steps done, the state after them, the last evaluation's loss."""

    step: int
    state: TrainState
    eval_loss: float | None


def _checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of each file in the subfolders of `folder`, by relative path.

    Those directly in it are orbax's notes on the save, which still change when it is committed.
    """
    checksums = {}
    for path in sorted(folder.glob("*/**/*")):
        if path.is_file():
            checksum = 0
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    checksum = zlib.crc32(block, checksum)
            checksums[str(path.relative_to(folder))] = checksum
    return checksums


def _check_files(folder: Path) -> None:
    """Raises CheckpointError when a file of the checkpoint `folder` is not as it was written."""
    found = _checksums(folder)
    for name, checksum in json.loads((folder / _FILES).read_bytes()).items():
        if name not in found:
            raise CheckpointError(f"{name} is missing")
        if found[name] != checksum:
            raise CheckpointError(f"{name} is not what was written")


class _KeepBest:
    """Keeps the checkpoint with the least evaluation loss, the newest of equals.

    Orbax has a policy for this, but one that forgets the losses of an earlier process.

    Args:
        losses: by step, of the checkpoints that have been evaluated; it may change.
    """

    def __init__(self, losses: Mapping[int, float]):
        self._losses = losses

    def should_preserve(
        self,
        checkpoints: Sequence[PolicyCheckpointInfo],
        *,
        context: preservation_policy.PreservationContext,
    ) -> Sequence[bool]:
        """Whether to keep each of `checkpoints`."""
        best = _best_step(self._losses, [checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step == best for checkpoint in checkpoints]


def _best_step(losses: Mapping[int, float], steps: Iterable[int]) -> int | None:
    evaluated = [step for step in steps if step in losses]
    return min(evaluated, key=lambda step: (losses[step], -step), default=None)


class Checkpoints:
    """The checkpoints in one folder.

    Args:
        folder: made when it is not there.
        keep: how many of the newest are kept, besides the one with the least evaluation loss.
        warn: told of checkpoints that could not be written or are damaged.
    """

    def __init__(self, folder: Path, keep: int, warn: Warn):
        self._folder = folder.absolute()
        self._warn = warn
        self._saving: int | None = None
        self._losses: dict[int, float] = {}
        self._num_damaged = 0
        # Orbax logs every step of a save, and every failure with the traces of all its threads.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        policies = [preservation_policy.LatestN(keep), _KeepBest(self._losses)]
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            # With folders made in a thread, writers wait for a signal that orbax may have lost
            # after a save that failed: the next one then stands still for five minutes.
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._list_files, create_directories_asynchronously=False
            ),
            cleanup_tmp_directories=True,
        )
        self._manager = self._open()
        self._read_losses()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self._folder, options=self._options)

    def save(self, step: int, state: TrainState, eval_loss: float | None) -> None:
        """Starts writing the state after `step` steps; it may be donated as soon as this returns.

        A checkpoint that cannot be written is told of and given up: training goes on, and older
        checkpoints stay.

        Args:
            step: number of steps done.
            state: on any mesh.
            eval_loss: of exactly these weights, or None.
        """
        self.settle()
        self._saving = step
        if eval_loss is not None:
            self._losses[step] = eval_loss
        try:
            self._check_space(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),  # type: ignore[call-arg]
                    about=ocp.args.JsonSave({_EVAL: eval_loss}),  # type: ignore[call-arg]
                ),
                force=True,
            )
        except Exception as error:  # orbax and tensorstore raise many unrelated types
            self._give_up(error)

    def _check_space(self, needed: int) -> None:
        """Raises CheckpointError in all processes alike: orbax makes them wait for each other."""
        problem: Exception | None = None
        if jax.process_index() == 0:
            try:
                check_space(self._folder, needed)
            except (CheckpointError, OSError) as error:
                problem = error
        if multihost_utils.broadcast_one_to_all(np.array(problem is not None)):
            raise problem or CheckpointError("the first process has no disk space")

    def _list_files(self) -> None:
        """Called by orbax's writing thread when all files are written but not committed yet."""
        if jax.process_index() == 0:
            (folder,) = self._folder.glob(f"{self._saving}.*tmp*")
            text = json.dumps(_checksums(folder), indent=2)
            (folder / _FILES).write_text(text + "\n")

    def settle(self) -> None:
        """Waits until the checkpoint that is being written is committed, or given up."""
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # as above; raised by the writing thread
            self._give_up(error)
        self._saving = None

    def _give_up(self, error: Exception) -> None:
        step, self._saving = self._saving, None
        assert step is not None
        self._losses.pop(step, None)
        older = [other for other in self._manager.all_steps(read=True) if other != step]
        rest = (
            f"the one of step {max(older)} stays the newest" if older else "there is no older one"
        )
        self._warn(
            f"{self._folder}: the checkpoint of step {step} could not be written: "
            f"{_reason(error)}; {rest}"
        )
        shutil.rmtree(self._folder / str(step), ignore_errors=True)
        self._manager = self._open()

    def restore(self, template: TrainState) -> Restored | None:
        """The newest checkpoint that is whole; damaged ones are told of and moved aside.

        Args:
            template: arrays, or ShapeDtypeStructs with shardings, like those that were saved.

        Returns:
            None when the folder holds no checkpoint.

        Raises:
            CheckpointError: all checkpoints are damaged.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._restore(step, template)
            except Exception as error:  # whatever a damaged file leads to
                self._set_aside(step, error)
        if self._num_damaged:
            raise CheckpointError(
                f"{self._folder}: none of its {self._num_damaged} checkpoints can be used; remove "
                "the run folder to start again"
            )
        return None

    def restore_best(self, template: TrainState) -> Restored | None:
        """The checkpoint with the least evaluation loss, the newest of equals; None if no
        checkpoint has been evaluated.

        Raises:
            CheckpointError: it is damaged.
        """
        self.settle()
        best = _best_step(self._losses, self._manager.all_steps())
        if best is None:
            return None
        try:
            return self._restore(best, template)
        except Exception as error:  # whatever a damaged file leads to
            raise CheckpointError(
                f"{self._folder / str(best)}: the checkpoint with the best evaluation is damaged: "
                f"{_reason(error)}; use checkpoint.export=last"
            ) from error

    def best_loss(self) -> float | None:
        """The least evaluation loss of all checkpoints; None if none has been evaluated."""
        self.settle()
        best = _best_step(self._losses, self._manager.all_steps())
        return None if best is None else self._losses[best]

    def newest(self) -> int | None:
        """The step of the newest checkpoint; None without any."""
        self.settle()
        return max(self._manager.all_steps(), default=None)

    def _read_losses(self) -> None:
        """Notes the evaluation losses of an earlier process; damaged checkpoints are set aside."""
        for step in self._manager.all_steps():
            try:
                loss = self._about(step)[_EVAL]
            except Exception as error:  # whatever a damaged file leads to
                self._set_aside(step, error)
            else:
                if loss is not None:
                    self._losses[step] = loss

    def _about(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(about=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["about"]

    def _restore(self, step: int, template: TrainState) -> Restored:
        _check_files(self._folder / str(step))
        about = self._about(step)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))  # type: ignore[call-arg]
        state = self._manager.restore(step, args=args)["state"]
        return Restored(step, TrainState(*state), about[_EVAL])

    def _set_aside(self, step: int, error: Exception) -> None:
        self._losses.pop(step, None)
        self._num_damaged += 1
        damaged = self._folder.with_name("damaged") / str(step)
        self._warn(
            f"{self._folder / str(step)}: the checkpoint is damaged: {_reason(error)}; it is moved "
            f"to {damaged}, and not used"
        )
        if jax.process_index() == 0:
            damaged.parent.mkdir(exist_ok=True)
            shutil.rmtree(damaged, ignore_errors=True)
            (self._folder / str(step)).rename(damaged)
        multihost_utils.sync_global_devices("checkpoint set aside")
        self._manager.reload()

    def close(self) -> None:
        """Waits for what is being written."""
        self.settle()
        self._manager.close()


def _reason(error: Exception) -> str:
    """What the system said, not what was being done: the error number, else the innermost cause."""
    cause: BaseException | None = error
    innermost: BaseException = error
    while cause is not None:
        if (code := _OS_ERROR.search(str(cause))) is not None:
            return os.strerror(int(code[1]))
        innermost, cause = cause, cause.__cause__ or cause.__context__
    return one_line(innermost)
