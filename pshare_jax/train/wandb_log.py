"""Metrics for Weights & Biases, when a run asks for it; the extra `wandb`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pshare_jax.convert.files import one_line
from pshare_jax.errors import MissingExtraError


class WandbLog:
    """A run of Weights & Biases: the same one whenever the run folder's goes on.

    Where its server cannot be reached training goes on; WANDB_MODE=offline keeps the figures in
    the run folder.

    Args:
        project: its name there.
        folder: the run folder.
        facts: what identifies the run.
        warn: told once when something fails.

    Raises:
        MissingExtraError: the package is not installed.
    """

    def __init__(
        self,
        project: str,
        folder: Path,
        facts: Mapping[str, Any],
        warn: Callable[[str], None],
    ):
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb  # pyright: ignore[reportMissingImports]  # an extra
        except ImportError as error:
            raise MissingExtraError(
                "report.wandb needs the package wandb: pip install 'pshare_jax[wandb]'"
            ) from error
        self._warn: Callable[[str], None] | None = warn
        self._run: Any = None
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self._guarded(
            lambda: wandb.init(
                project=project,
                id=name,
                name=folder.name,
                dir=str(folder),
                config=dict(facts),
                resume="allow",
            )
        )

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Logs `values` as those after `step` steps."""
        if self._run is not None:
            self._guarded(lambda: self._run.log(dict(values), step=step) or self._run)

    def close(self) -> None:
        """Ends the run there."""
        if self._run is not None:
            self._guarded(lambda: self._run.finish() or self._run)

    def _guarded(self, act: Callable[[], Any]) -> None:
        """Keeps what `act` gives as the run; after an error there is none."""
        try:
            self._run = act()
        except Exception as error:  # its own, and those of its transport
            self._run = None
            if self._warn is not None:
                self._warn(f"report.wandb: {one_line(error)}; training goes on without it")
            self._warn = None
