"""A progress bar on a terminal, silence elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[str, int], None]
"""Called with the name of a finished tensor and its bytes."""


def quiet(name: str, nbytes: int) -> None:
    """A Report that shows nothing."""


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Report]:
    """Shows how many of `total` bytes are done, on standard error and only on a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield quiet
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(title, total=total)

        def report(name: str, nbytes: int) -> None:
            bar.update(task, advance=nbytes, description=f"{title}: {name}")

        yield report
