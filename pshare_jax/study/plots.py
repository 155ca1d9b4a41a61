"""Plots of a study, from its result files."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pshare_jax.errors import ConfigError
from pshare_jax.study.config import ORDINARY, SHARES, tail_name
from pshare_jax.study.rows import METHODS, NAIVE, Result, Row, rows_of

_FEWEST_POINTS = 3
"""Two are a line of a table."""


def plot_shares(results: Sequence[Result], task: str, path: Path) -> bool:
    """Accuracy against the share of the prompt that is read from the base's KV (the paper's
    Figure 2), as a PNG, of runs with all of `SHARES`; whether there are any.

    Raises:
        ConfigError: there are some, and matplotlib is not installed.
    """
    lines: dict[str, list[Result]] = defaultdict(list)
    wanted = {f"test, share {share}" for share in SHARES}
    for result in results:
        if result["task"] == task and wanted.issubset(result["evaluations"]):
            name = NAIVE if result["method"] == "full" else METHODS[result["method"]]
            lines[f"{name}, {result['examples']:,} examples"].append(result)
    if not lines:
        return False
    figure, axes = _figure()
    for name, group in sorted(lines.items()):
        shares = [100 * share for share in SHARES]
        means = [
            100 * statistics.mean(r["evaluations"][f"test, share {s}"]["accuracy"] for r in group)
            for s in SHARES
        ]
        axes.plot(shares, means, marker="o", label=name)
    axes.set_xlabel("share of the prompt read from the base's KV, %")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(task)
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def plot_saved(results: Sequence[Result], task: str, path: Path) -> bool:
    """Test accuracy against the share of prefill that a module did not compute itself, all methods
    in one plot, as a PNG; whether there is enough to plot.

    Raises:
        ConfigError: there is, and matplotlib is not installed.
    """
    examples, lines = saved_lines([r for r in results if r["task"] == task])
    if sum(map(len, lines.values())) < _FEWEST_POINTS:
        return False
    figure, axes = _figure()
    named = set()
    for name, points in sorted(lines.items()):
        x, y, labels = zip(*sorted(points), strict=True)
        axes.plot(x, y, marker="o", markersize=4, label=name)
        for *at, label in zip(x, y, labels, strict=True):
            # Methods with the same tail share as much: once is enough.
            if (label, round(at[0])) not in named:
                named.add((label, round(at[0])))
                axes.annotate(label, at, xytext=(0, 5), textcoords="offset points", fontsize=7)
    axes.set_xlabel("share of prefill that is not computed for the model, %")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{task}, {examples:,} examples")
    axes.set_ylim(0, 110)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def saved_lines(
    results: Sequence[Result],
) -> tuple[int, dict[str, list[tuple[float, float, str]]]]:
    """The lines of `plot_saved`, by name: the prefill that is saved and the accuracy, in percent,
    and what distinguishes a point: its tail, or the layers that are computed anew.

    Args:
        results: on one task. Those count that have as many examples as full fine-tuning, or,
            without it, the most that there are; seeds are averaged.

    Returns:
        The number of examples, and the lines.
    """
    own = [r for r in results if r["method"] != "base"]
    rows = [*rows_of(own), *_shares(own)]
    full = [row.examples for row in rows if row.method == "full"]
    examples = max(full or [row.examples for row in rows], default=0)
    lines: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for row in rows:
        saved = row.saved(own)
        if row.examples == examples and saved is not None:
            accuracy = 100 * statistics.mean(row.accuracies())
            lines[_line(row)].append((100 * saved, accuracy, _point(row)))
    return examples, lines


def _shares(results: Sequence[Result]) -> list[Row]:
    """Ordinary fine-tunes that read some share of the prompt from the base, of one task."""
    rows = []
    for row in rows_of(results):
        if row.method in ORDINARY and row.evaluation == "test":
            for share in SHARES[1:-1]:
                name = f"test, share {share}"
                if runs := [run for run in row.runs if name in run["evaluations"]]:
                    rows.append(Row(NAIVE, runs, name))
    return rows


def _line(row: Row) -> str:
    """What a point's line is called."""
    method = METHODS[row.method]
    if row.evaluation == "test":
        return method
    return f"{'layers computed anew' if 'layers' in row.evaluation else NAIVE} ({method})"


def _point(row: Row) -> str:
    """What distinguishes a point on its line."""
    if row.evaluation != "test":
        return row.evaluation.removeprefix("test, ") if "layers" in row.evaluation else ""
    return tail_name(row.runs[0]["tail"]) if row.method in ("prefillshare", "lora") else ""


def _figure() -> tuple[Any, Any]:
    # Imported late: it is an extra.
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "the report's plots need matplotlib: pip install 'pshare_jax[study]'"
        ) from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    return figure, figure.subplots()
