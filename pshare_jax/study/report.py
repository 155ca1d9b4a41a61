"""Tables of a study, from its result files."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from pshare_jax.convert.manifest import read_json
from pshare_jax.errors import DataError
from pshare_jax.evals.intervals import (
    item_bootstrap_interval,
    item_wilson_interval,
    sign_flip_test,
)
from pshare_jax.study.config import AS_SERVED, MARGIN, TEAM_TASK
from pshare_jax.study.rows import METHODS, Result, Row, name_of, pairs, place, rows_of
from pshare_jax.study.tasks import SUMMARY_FILE

_REFERENCES = ("full", "ordinary-lora")
"""What a task's methods are compared with: the first that there is."""


def read_results(folder: Path) -> list[Result]:
    """All result files of `folder`.

    Raises:
        DataError: there are none.
    """
    paths = [path for path in sorted(folder.glob("*.json")) if path.name != SUMMARY_FILE]
    if not paths:
        raise DataError(f"{folder}: no results; make them with python -m pshare_jax.study run")
    return [result for path in paths if "evaluations" in (result := read_json(path))]


def read_teams(folder: Path) -> list[Result]:
    """All results of teams of `folder`."""
    found = [read_json(path) for path in sorted(folder.glob(f"{TEAM_TASK}-*.json"))]
    return [result for result in found if "modes" in result]


def tables(results: Sequence[Result], margin: float = MARGIN) -> str:
    """Markdown: a table for each task, and how learning rates were chosen.

    Args:
        results: see `read_results`.
        margin: see `StudyConfig.margin`.
    """
    parts = [_task_table(task, found, margin) for task, found in _by_task(results).items()]
    return "\n".join([*parts, *_rates(results)])


def interval(accuracies: Sequence[float], runs: int) -> str:
    """A mean over items, in percent, with its interval; each is of that many runs."""
    low, high = item_wilson_interval(accuracies, runs=runs)
    return f"{100 * statistics.mean(accuracies):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def glance(results: Sequence[Result]) -> str:
    """Markdown: the methods by the tasks, of as much data as full fine-tuning had on them; empty if
    it was not evaluated on two tasks at least."""
    by_task = _by_task(results)
    columns: dict[str, dict[str, str]] = {}
    for task, found in by_task.items():
        rows = rows_of(found)
        examples = max((row.examples for row in rows if row.method == "full"), default=0)
        if examples:
            own = [row for row in rows if row.examples in (0, examples)]
            columns[task] = {row.name: _glance_cell(row, found) for row in own}
    if len(columns) < 2:
        return ""
    ordered = sorted((row for task in columns for row in rows_of(by_task[task])), key=place)
    lines = [
        "Test accuracy in percent with as much data as full fine-tuning; in brackets the share of "
        "prompts' prefill that is taken from the base, and seeds where there is more than one.\n",
        f"| | {' | '.join(columns)} |",
        f"|---|{'--:|' * len(columns)}",
    ]
    for name in dict.fromkeys(row.name for row in ordered):
        cells = [column.get(name, "") for column in columns.values()]
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _by_task(results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        found[result["task"]].append(result)
    return found


def _glance_cell(row: Row, results: Sequence[Result]) -> str:
    saved = row.saved(results)
    said = [] if saved is None or row.method == "base" else [f"{100 * saved:.0f} %"]
    if len(row.runs) > 1:
        said.append(f"{len(row.runs)} seeds")
    accuracy = f"{100 * statistics.mean(row.accuracies()):.1f}"
    return accuracy + (f" ({'; '.join(said)})" if said else "")


def _task_table(task: str, results: Sequence[Result], margin: float) -> str:
    """A line for each method and size; accuracies of several seeds are averaged."""
    rows = rows_of(results)
    if not rows:
        return f"**{task}**: not measured yet.\n"
    reference = next((m for m in _REFERENCES if any(row.method == m for row in rows)), None)
    references = [r for r in rows if r.method == reference and r.evaluation == "test"]
    titles = ["", "examples", "seeds", "shared %", "test accuracy % (95 % interval)", "as served %"]
    if reference is not None:
        titles += [f"against {METHODS[reference]}, points (95 % interval)", "p"]
        titles += ["not inferior"] if margin else []
    lines = [f"| {' | '.join(titles)} |", f"|---|{'--:|' * (len(titles) - 1)}"]
    for row in rows:
        saved = None if row.method == "base" else row.saved(results)
        cells = [
            row.name,
            f"{row.examples:,}" if row.examples else "-",
            str(len(row.runs)),
            "-" if saved is None else f"{100 * saved:.0f}",
            interval(row.accuracies(), len(row.runs)),
            _as_served(row),
        ]
        if reference is not None:
            compared = [] if row in references else _compared(row, references, margin)
            cells += compared or ["-"] * (len(titles) - len(cells))
        lines.append(f"| {' | '.join(cells)} |")
    return f"**{task}**\n\n" + "\n".join(lines) + "\n"


def _as_served(row: Row) -> str:
    """Mean accuracy of the runs that were evaluated so, beside that of the same runs."""
    found = [r["evaluations"] for r in row.runs if AS_SERVED in r["evaluations"]]
    if row.evaluation != "test" or not found:
        return "-"
    served, own = (
        100 * statistics.mean(e[name]["accuracy"] for e in found) for name in (AS_SERVED, "test")
    )
    # Of some seeds only: what they are to be compared with.
    partly = f" ({own:.1f} in float32; {len(found)} of {len(row.runs)} seeds)"
    return f"{served:.1f}" + (partly if len(found) < len(row.runs) else "")


def _compared(row: Row, references: Sequence[Row], margin: float) -> list[str]:
    """Difference, p and verdict over the seeds that a row and its reference have; none of none."""
    paired = list(pairs(row, references))
    if not paired:
        return []
    theirs = Row("", [one for one, _ in paired]).accuracies()
    own = Row("", [other for _, other in paired], row.evaluation).accuracies()
    differences = [a - b for a, b in zip(own, theirs, strict=True)]
    low, high = item_bootstrap_interval(differences)
    said = f"{100 * statistics.mean(differences):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    if len(paired) < len(row.runs):
        said += f"; {len(paired)} of {len(row.runs)} seeds"
    verdict = "yes" if low > -margin else "no" if high < -margin else "open"
    data = paired[0][0]["examples"]
    if data != row.examples:
        said += f"; of {data:,}"
        verdict = "-"
    p = sign_flip_test(differences, runs=len(paired))
    return [said, f"{p:.2g}", *([verdict] if margin else [])]


def _rates(results: Iterable[Result]) -> list[str]:
    """Accuracies on the validation set of runs that differ in their learning rate alone."""
    sweeps: dict[tuple[str, str, int, int], dict[float, float]] = defaultdict(dict)
    for result in results:
        if (found := result["evaluations"].get("validation")) is not None:
            key = (result["task"], name_of(result), result["examples"], result["seed"])
            sweeps[key][result["learning_rate"]] = found["accuracy"]
    lines = []
    for (task, name, examples, _), tried in sweeps.items():
        if len(tried) > 1:
            best = max(tried, key=lambda rate: tried[rate])
            cells = [
                f"**{rate:g}: {100 * tried[rate]:.1f}**"
                if rate == best
                else f"{rate:g}: {100 * tried[rate]:.1f}"
                for rate in sorted(tried)
            ]
            lines.append(f"| {task} | {name} | {examples:,} | {', '.join(cells)} |")
    if not lines:
        return []
    head = (
        "Learning rates, chosen by the accuracy on the validation set (percent):"
        "\n\n| task | method | examples | rate: accuracy |\n|---|---|--:|---|\n"
    )
    return [head + "\n".join(lines) + "\n"]
