"""Tables and plots of a study, from its result files."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pshare_jax.convert.manifest import read_json
from pshare_jax.errors import ConfigError, DataError
from pshare_jax.evals.intervals import (
    item_bootstrap_interval,
    mcnemar,
    paired_bootstrap_interval,
)
from pshare_jax.study.config import SHARES
from pshare_jax.study.tasks import SUMMARY_FILE

Result = Mapping[str, Any]

_METHODS = {
    "base": "base, not trained",
    "full": "full fine-tuning",
    "prefillshare": "PrefillShare, all weights",
    "lora": "PrefillShare, LoRA",
}
_NAIVE = "naive sharing"
_NAIVE_SHARE = "test, share 1.0"


def read_results(folder: Path) -> list[Result]:
    """All result files of `folder`.

    Raises:
        DataError: there are none.
    """
    paths = [path for path in sorted(folder.glob("*.json")) if path.name != SUMMARY_FILE]
    if not paths:
        raise DataError(f"{folder}: no results; make them with python -m pshare_jax.study run")
    return [read_json(path) for path in paths]


def tables(results: Sequence[Result]) -> str:
    """Markdown: the accuracies of each task, and what was tried on the validation sets."""
    tasks = list(dict.fromkeys(result["task"] for result in results))
    parts = [_test_table(task, [r for r in results if r["task"] == task]) for task in tasks]
    return "\n".join([*parts, *_comparisons(results), _validation_table(results)])


def _test_table(task: str, results: Sequence[Result]) -> str:
    """One row a method and size; accuracies of several seeds are averaged."""
    groups: dict[tuple[str, int, int], list[Result]] = defaultdict(list)
    for result in results:
        if "test" in result["evaluations"]:
            key = (result["method"], result.get("examples", 0), result.get("tail", 1))
            groups[key].append(result)
    order = {method: place for place, method in enumerate(_METHODS)}
    rows = []
    for method, examples, tail in sorted(groups, key=lambda k: (order[k[0]], k[1:])):
        group = groups[method, examples, tail]
        name = _METHODS[method] + (f", tail {tail}" if tail > 1 else "")
        rows.append(_row(name, group, "test", group))
        if method == "full" and all(_NAIVE_SHARE in r["evaluations"] for r in group):
            rows.append(_row(f"{_NAIVE} (those weights)", group, _NAIVE_SHARE, []))
    if not rows:
        return f"**{task}**: not measured yet.\n"
    head = (
        f"**{task}**\n\n| | examples | seeds | test accuracy % (95 % interval) | "
        "steps, min | the base's KV, min |\n|---|--:|--:|--:|--:|--:|\n"
    )
    return head + "\n".join(rows) + "\n"


def _row(name: str, group: Sequence[Result], evaluation: str, trained: Sequence[Result]) -> str:
    accuracies = _accuracies(group, evaluation)
    low, high = item_bootstrap_interval(accuracies)
    cells = (
        name,
        f"{group[0]['examples']:,}" if group[0].get("examples") else "-",
        str(len(group)),
        f"{100 * statistics.mean(accuracies):.1f} ({100 * low:.1f} - {100 * high:.1f})",
        _minutes(trained, "step_seconds"),
        _minutes(trained, "kv_batch_seconds"),
    )
    return f"| {' | '.join(cells)} |"


def _flags(result: Result, evaluation: str) -> list[bool]:
    return [right == "1" for right in result["evaluations"][evaluation]["correct"]]


def _accuracies(group: Sequence[Result], evaluation: str) -> list[float]:
    """Of each item: the share of the runs that were right."""
    runs = [_flags(result, evaluation) for result in group]
    return [statistics.mean(item) for item in zip(*runs, strict=True)]


def _comparisons(results: Sequence[Result]) -> list[str]:
    """Everything that reads the base's KV against full fine-tuning, paired by seed and item."""
    rows = []
    for full in results:
        if full["method"] != "full" or "test" not in full["evaluations"]:
            continue
        for other in results:
            if other["task"] != full["task"] or other.get("seed") != full["seed"]:
                continue
            if other is full and _NAIVE_SHARE in full["evaluations"]:
                rows.append(_comparison(_NAIVE, full, other, _NAIVE_SHARE))
            elif other["method"] not in ("full", "base") and "test" in other["evaluations"]:
                tail = f", tail {other['tail']}" if other["tail"] > 1 else ""
                name = f"{_METHODS[other['method']]}{tail}"
                rows.append(_comparison(name, full, other, "test"))
    if not rows:
        return []
    head = (
        "Against full fine-tuning, with the same seed and on the same test items: difference in "
        "points, and the p-value of McNemar's exact test.\n\n"
        "| task | full fine-tuning | against | examples | seed | difference (95 % interval) | p |\n"
        "|---|--:|---|--:|--:|--:|--:|\n"
    )
    return [head + "\n".join(rows) + "\n"]


def _comparison(name: str, full: Result, other: Result, evaluation: str) -> str:
    a, b = _flags(full, "test"), _flags(other, evaluation)
    low, high = paired_bootstrap_interval(a, b)
    difference = statistics.mean(b) - statistics.mean(a)
    cells = (
        full["task"],
        f"{full['examples']:,} examples",
        name,
        f"{other['examples']:,}",
        str(full["seed"]),
        f"{100 * difference:+.1f} ({100 * low:+.1f} - {100 * high:+.1f})",
        f"{mcnemar(a, b).p_value:.2g}",
    )
    return f"| {' | '.join(cells)} |"


def _minutes(group: Sequence[Result], key: str) -> str:
    """What the steps of a run took, or the KV of its batches, which other runs can read too."""
    runs = [training for result in group if (training := result.get("training"))]
    minutes = [run["steps"] * run[key] / 60 for run in runs if run.get(key) is not None]
    return f"{statistics.mean(minutes):.1f}" if minutes else "-"


def _validation_table(results: Iterable[Result]) -> str:
    rows = []
    for result in results:
        if (evaluation := result["evaluations"].get("validation")) is not None:
            low, high = evaluation["interval"]
            rows.append(
                f"| {result['task']} | {_METHODS[result['method']]} | {result['tail']} | "
                f"{result['learning_rate']:g} | {result['examples']:,} | {result['seed']} | "
                f"{100 * evaluation['accuracy']:.1f} ({100 * low:.1f} - {100 * high:.1f}) |"
            )
    head = (
        "Every run, on the validation sets that settings were chosen on:\n\n"
        "| task | method | tail | learning rate | examples | seed | accuracy % (95 % interval) |\n"
        "|---|---|--:|--:|--:|--:|--:|\n"
    )
    return head + "\n".join(rows) + "\n"


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
            name = _NAIVE if result["method"] == "full" else _METHODS[result["method"]]
            lines[f"{name}, {result['examples']:,} examples"].append(result)
    if not lines:
        return False
    # Imported late: it is an extra.
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "the report's plots need matplotlib: pip install 'pshare_jax[study]'"
        ) from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
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
