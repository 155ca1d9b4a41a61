"""Plots of a study, from its result files."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pshare_jax.errors import ConfigError
from pshare_jax.study.config import ORDINARY, SHARES
from pshare_jax.study.report import METHODS, NAIVE, Result, best_layers, name_of


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
    in one plot, as a PNG; whether there is anything to plot.

    Of each method the results with the most examples; seeds are averaged.

    Raises:
        ConfigError: there is something, and matplotlib is not installed.
    """
    own = [r for r in results if r["task"] == task and r["method"] != "base"]
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for group in _largest_groups(own):
        for name, evaluation in _labelled(group):
            found = [r["evaluations"][evaluation] for r in group]
            saved = [_saved(r, evaluation, own) for r in group]
            if None not in saved:
                accuracy = 100 * statistics.mean(f["accuracy"] for f in found)
                series[name].append((100 * statistics.mean(saved), accuracy))  # type: ignore[type-var]
    if not series:
        return False
    figure, axes = _figure()
    for name, points in sorted(series.items()):
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, marker="o", label=name)
    axes.set_xlabel("share of prefill that is not computed for the model, %")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(task)
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def _largest_groups(results: Sequence[Result]) -> list[list[Result]]:
    """Results on a test set by method and tail, those with the most examples."""
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        if "test" in result["evaluations"]:
            groups[result["method"], str(result["tail"])].append(result)
    largest = []
    for group in groups.values():
        most = max(r["examples"] for r in group)
        largest.append([r for r in group if r["examples"] == most])
    return largest


def _labelled(group: Sequence[Result]) -> Iterator[tuple[str, str]]:
    """Names and evaluations of one method: as it is served, with shares of the prompt shared
    naively, and with layers computed anew."""
    result = group[0]
    yield name_of(result), "test"
    if result["method"] not in ORDINARY:
        return
    for share in SHARES:
        if all((name := f"test, share {share}") in r["evaluations"] for r in group):
            yield f"{NAIVE}: {METHODS[result['method']]}", name
    for name in best_layers(group):
        yield f"layers computed anew: {METHODS[result['method']]}", name


def _saved(result: Result, evaluation: str, others: Sequence[Result]) -> float | None:
    """The share, 0 to 1, of prefill that was saved; None where it cannot be told.

    Results of earlier versions do not state it; for a tail of so many tokens it follows from the
    mean length of the prompts, which any other result on the task tells.
    """
    found = result["evaluations"][evaluation]
    if "saved" in found:
        return found["saved"]
    if evaluation.startswith("test, share "):
        return float(evaluation.removeprefix("test, share "))
    if result["method"] in ORDINARY:
        return 0.0
    for other in others:
        test = other["evaluations"].get("test", {})
        if "prompt_tokens" in test and isinstance(result["tail"], int):
            mean = test["prompt_tokens"] / len(test["correct"])
            return max(1 - result["tail"] / mean, 0.0)
    return None


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
