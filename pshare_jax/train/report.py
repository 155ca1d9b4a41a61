"""What a run tells: a progress bar or lines, metrics as JSON lines and for TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

from pshare_jax.convert.files import one_line, replace_file
from pshare_jax.errors import CheckpointError
from pshare_jax.train.config import ReportConfig
from pshare_jax.train.wandb_log import WandbLog

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
_SECONDS_BETWEEN_LINES = 10.0


class Reporter:
    """Tells the user on standard error: a bar on a terminal, now and then a line elsewhere.

    Args:
        active: False in all processes but one, which then say nothing.
    """

    def __init__(self, active: bool = True):
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._active = active
        self._bar: Progress | None = None
        self._last_line = -math.inf
        self._start = 0.0
        self._first = 0

    def say(self, message: str) -> None:
        """Shows one line, above the bar if there is one."""
        if self._active:
            self._console.print(message, markup=False)

    def start(self, title: str, total: int, done: int = 0) -> None:
        """Starts counting to `total`; what is `done` already does not count for the time left."""
        self.stop()
        self._start, self._first, self._last_line = time.monotonic(), done, -math.inf
        if self._active and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
            self._bar.add_task(title, total=total, completed=done, note="")

    def advance(self, title: str, done: int, total: int, note: str = "") -> None:
        """Shows that `done` of `total` are done."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, note=note)
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or done == total:
            self._last_line = now
            rate = (now - self._start) / max(done - self._first, 1)
            left = timedelta(seconds=round(rate * (total - done)))
            self.say(f"{title} {done}/{total}  {note}  {left} left")

    def stop(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class MetricsLog:
    """`metrics.jsonl` and, if wanted, TensorBoard events in a run folder.

    Args:
        folder: the run folder.
        first_step: a resumed run's first step; what was logged from there on is dropped, since it
            will be logged again.
        config: whether to write events, and which project of Weights & Biases gets the figures.
        warn: told once when the disk takes no more; training goes on without what is lost.
        facts: what identifies the run, as a JSON object.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        config: ReportConfig,
        warn: Callable[[str], None],
        facts: Mapping[str, Any] | None = None,
    ):
        self._path = folder / METRICS_FILE
        self._wandb = None
        if config.wandb:
            self._wandb = WandbLog(config.wandb, folder, facts or {}, warn)
        replace_file(self._path, "".join(_lines(self._path, first_step)))
        self._warn: Callable[[str], None] | None = warn
        try:
            events = folder / TENSORBOARD_FOLDER
            self._events = _EventFile(events, first_step) if config.tensorboard else None
            self._file = self._path.open("a", buffering=1)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be written: {one_line(error)}") from error

    def write(self, step: int, values: dict[str, float | int]) -> None:
        """Logs `values` as those after `step` steps; one that is not finite becomes null."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        record = {"step": step} | dict.fromkeys(values) | finite
        with self._warning_once():
            self._file.write(json.dumps(record) + "\n")
            if self._events is not None:
                self._events.write(step, finite)
        if self._wandb is not None:
            self._wandb.write(step, finite)

    def close(self) -> None:
        """Flushes and closes the files."""
        with self._warning_once():
            self._file.close()
        with self._warning_once():
            if self._events is not None:
                self._events.close()
        if self._wandb is not None:
            self._wandb.close()

    @contextlib.contextmanager
    def _warning_once(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._warn is not None:
                self._warn(
                    f"{self._path.parent}: metrics cannot be written: {one_line(error)}; training "
                    "goes on"
                )
            self._warn = None


class _EventFile:
    """TensorBoard's events of one start, written by the caller's thread: that of tensorboardX's
    `SummaryWriter` dies of a full disk, and then the caller waits for its queue for ever."""

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # Two starts within a second would share a file but for the suffix.
        self._writer = EventsWriter(str(folder / "events"), f".{first_step}")
        started = SessionLog(status=SessionLog.START)
        # Hides what an earlier start wrote from this step on.
        self._writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=started))

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=scalars))
        self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _lines(path: Path, end: int) -> list[str]:
    """Lines of an earlier start for steps before `end`; a kill or a full disk can leave half of
    one, which is dropped."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            before = json.loads(line)["step"] < end
        except (ValueError, TypeError, KeyError):
            continue
        if before and line.endswith("\n"):
            lines.append(line)
    return lines
