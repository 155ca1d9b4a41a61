"""Tables and plots of a study, from its result files."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pshare_jax.convert.manifest import read_json
from pshare_jax.errors import DataError
from pshare_jax.evals.intervals import (
    item_bootstrap_interval,
    mcnemar,
    paired_bootstrap_interval,
)
from pshare_jax.study.config import AS_SERVED, ORDINARY, TEAM_TASK, tail_name
from pshare_jax.study.tasks import SUMMARY_FILE

Result = Mapping[str, Any]

METHODS = {
    "base": "base, not trained",
    "full": "full fine-tuning",
    "ordinary-lora": "LoRA with KV of its own",
    "prefillshare": "PrefillShare, all weights",
    "lora": "PrefillShare, LoRA",
    "alora": "activated LoRA",
}
NAIVE = "naive sharing"
MARGIN = 0.02
"""See `StudyConfig.margin`."""
NAIVE_SHARE = "test, share 1.0"
_LAYERS = "validation, layers "


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
    """Markdown: the accuracies of each task, and what was tried on the validation sets.

    Args:
        results: see `read_results`.
        margin: see `StudyConfig.margin`.
    """
    tasks = list(dict.fromkeys(result["task"] for result in results))
    parts = [_test_table(task, [r for r in results if r["task"] == task]) for task in tasks]
    return "\n".join([*parts, *_comparisons(results, margin), _validation_table(results)])


def _test_table(task: str, results: Sequence[Result]) -> str:
    """One row a method and size; accuracies of several seeds are averaged."""
    groups: dict[tuple[str, int, str], list[Result]] = defaultdict(list)
    for result in results:
        if "test" in result["evaluations"]:
            key = (result["method"], result.get("examples", 0), str(result.get("tail", 1)))
            groups[key].append(result)
    order = {method: place for place, method in enumerate(METHODS)}
    rows = []
    for method, examples, tail in sorted(groups, key=lambda k: (order[k[0]], k[1:])):
        group = groups[method, examples, tail]
        rows.append(_row(name_of(group[0]), group, "test", group))
        if method in ORDINARY and all(NAIVE_SHARE in r["evaluations"] for r in group):
            rows.append(_row(f"{NAIVE} (those weights)", group, NAIVE_SHARE, []))
        for name in best_layers(group):
            label = f"{name.removeprefix('test, ')} computed anew (those weights)"
            rows.append(_row(label, group, name, []))
    if not rows:
        return f"**{task}**: not measured yet.\n"
    head = (
        f"**{task}**\n\n| | examples | seeds | test accuracy % (95 % interval) | as served % | "
        "steps, min | the base's KV, min |\n|---|--:|--:|--:|--:|--:|--:|\n"
    )
    return head + "\n".join(rows) + "\n"


def name_of(result: Result) -> str:
    """Method and tail in words."""
    tail = result.get("tail", 1)
    return METHODS[result["method"]] + (f", {tail_name(tail)}" if tail != 1 else "")


def best_layers(group: Sequence[Result]) -> list[str]:
    """Evaluations on the test set with layers computed anew: of each number of layers the ones
    that were best on the validation set."""
    best: dict[int, tuple[float, str]] = {}
    for name in group[0]["evaluations"]:
        if not name.startswith(_LAYERS):
            continue
        first, _, end = name.removeprefix(_LAYERS).partition("-")
        test = name.replace("validation", "test", 1)
        if not all(e in r["evaluations"] for r in group for e in (name, test)):
            continue
        accuracy = statistics.mean(r["evaluations"][name]["accuracy"] for r in group)
        count = int(end) - int(first)
        best[count] = max(best.get(count, (-1.0, "")), (accuracy, test))
    return [best[count][1] for count in sorted(best)]


def _row(name: str, group: Sequence[Result], evaluation: str, trained: Sequence[Result]) -> str:
    accuracies = _accuracies(group, evaluation)
    low, high = item_bootstrap_interval(accuracies)
    cells = (
        name,
        f"{group[0]['examples']:,}" if group[0].get("examples") else "-",
        str(len(group)),
        f"{100 * statistics.mean(accuracies):.1f} ({100 * low:.1f} - {100 * high:.1f})",
        _as_served(trained),
        _minutes(trained, "step_seconds"),
        _minutes(trained, "kv_batch_seconds"),
    )
    return f"| {' | '.join(cells)} |"


def _as_served(group: Sequence[Result]) -> str:
    """Mean accuracy of the runs that were evaluated so, beside that of the same runs."""
    found = [r["evaluations"] for r in group if AS_SERVED in r["evaluations"]]
    if not found:
        return "-"
    served, own = (
        100 * statistics.mean(e[name]["accuracy"] for e in found) for name in (AS_SERVED, "test")
    )
    # Of some seeds only: what they are to be compared with.
    partly = f" ({own:.1f} in float32; {len(found)} of {len(group)} seeds)"
    return f"{served:.1f}" + (partly if len(found) < len(group) else "")


def _flags(result: Result, evaluation: str) -> list[bool]:
    return [right == "1" for right in result["evaluations"][evaluation]["correct"]]


def _accuracies(group: Sequence[Result], evaluation: str) -> list[float]:
    """Of each item: the share of the runs that were right."""
    runs = [_flags(result, evaluation) for result in group]
    return [statistics.mean(item) for item in zip(*runs, strict=True)]


def _comparisons(results: Sequence[Result], margin: float) -> list[str]:
    """Everything that reads the base's KV against full fine-tuning, paired by seed and item."""
    rows = []
    for full in results:
        if full["method"] != "full" or "test" not in full["evaluations"]:
            continue
        for other in results:
            if other["task"] != full["task"] or other.get("seed") != full["seed"]:
                continue
            if other is full and NAIVE_SHARE in full["evaluations"]:
                rows.append(_comparison(NAIVE, full, other, NAIVE_SHARE))
            elif other["method"] not in ("full", "base") and "test" in other["evaluations"]:
                rows.append(_comparison(name_of(other), full, other, "test"))
    if not rows:
        return []
    head = (
        "Against full fine-tuning, with the same seed and on the same test items: difference in "
        "points, and the p-value of McNemar's exact test.\n\n"
        "| task | full fine-tuning | against | examples | seed | difference (95 % interval) | p |\n"
        "|---|--:|---|--:|--:|--:|--:|\n"
    )
    return [head + "\n".join(rows) + "\n", *_pooled(results, margin)]


def _pooled(results: Sequence[Result], margin: float) -> list[str]:
    """Each method against full fine-tuning over all seeds that both have: not inferior or not."""
    full = {
        (r["task"], r["examples"], r["seed"]): r
        for r in results
        if r["method"] == "full" and "test" in r["evaluations"]
    }
    pairs: dict[tuple[str, str, int], list[tuple[Result, Result]]] = defaultdict(list)
    for other in results:
        if other["method"] in ("full", "base") or "test" not in other["evaluations"]:
            continue
        key = (other["task"], other["examples"], other["seed"])
        if key in full:
            pairs[other["task"], name_of(other), other["examples"]].append((full[key], other))
    rows = []
    for (task, name, examples), group in sorted(pairs.items()):
        own = _accuracies([other for _, other in group], "test")
        theirs = _accuracies([one for one, _ in group], "test")
        differences = [a - b for a, b in zip(own, theirs, strict=True)]
        low, high = item_bootstrap_interval(differences)
        verdict = "yes" if low > -margin else "no" if high < -margin else "open"
        cells = (
            task,
            name,
            f"{examples:,}",
            str(len(group)),
            f"{100 * statistics.mean(differences):+.1f} ({100 * low:+.1f} - {100 * high:+.1f})",
            verdict,
        )
        rows.append(f"| {' | '.join(cells)} |")
    if not rows:
        return []
    head = (
        "The same with equal data, over all seeds that both have. *Not inferior* means: by at most "
        f"{100 * margin:g} points (`margin`), the whole 95 % interval; `no`: inferior by more, the "
        "whole interval; `open`: neither is shown.\n\n"
        "| task | method | examples | seeds | difference (95 % interval) | not inferior |\n"
        "|---|---|--:|--:|--:|---|\n"
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
                f"| {result['task']} | {METHODS[result['method']]} | {result['tail']} | "
                f"{result['learning_rate']:g} | {result['examples']:,} | {result['seed']} | "
                f"{100 * evaluation['accuracy']:.1f} ({100 * low:.1f} - {100 * high:.1f}) |"
            )
    head = (
        "Runs on the validation sets that settings were chosen on:\n\n"
        "| task | method | tail | learning rate | examples | seed | accuracy % (95 % interval) |\n"
        "|---|---|--:|--:|--:|--:|--:|\n"
    )
    return head + "\n".join(rows) + "\n"
