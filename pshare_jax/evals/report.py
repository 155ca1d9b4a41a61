"""What an evaluation shows on the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
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
from rich.table import Table

from pshare_jax.evals.compare import Comparison
from pshare_jax.evals.intervals import Interval
from pshare_jax.evals.run import Report


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Report]:
    """Shows graded answers and the accuracy so far, on standard error and only on a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda graded, correct: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, accuracy="")

        def report(graded: int, correct: int) -> None:
            bar.update(task, completed=graded, accuracy=f"{correct / graded:.1%} right")

        yield report


def summary(result: Mapping[str, Any]) -> str:
    """One result in two lines."""
    low, high = result["bootstrap_95"]
    rate = result["tokens_per_second"]
    speed = "" if rate is None else f", {rate:,.0f} tokens/s"
    return (
        f"{result['model']} on {result['data']['file']}: {result['correct']} of {result['items']} "
        f"right, {result['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%})\n"
        f"{result['seconds']:.1f} s{speed}"
    )


def comparison_table(comparison: Comparison, name_a: str, name_b: str) -> Table:
    """A comparison as a table."""
    test = comparison.mcnemar
    table = Table(title=f"{comparison.items} items", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row(name_a, f"{comparison.accuracy_a:.1%}")
    table.add_row(name_b, f"{comparison.accuracy_b:.1%}")
    table.add_row("difference", _points(comparison.difference))
    table.add_row("95 % interval", _interval(comparison.difference_95))
    table.add_row("the same answer, letter by letter", str(comparison.same_answers))
    table.add_row("only the first is right", str(test.only_a))
    table.add_row("only the second is right", str(test.only_b))
    table.add_row("McNemar's exact test", f"p = {test.p_value:.3g}")
    return table


def _interval(interval: Interval) -> str:
    return f"{_points(interval[0])} to {_points(interval[1])}"


def _points(value: float) -> str:
    return f"{value * 100:+.1f} points"
