"""What a study's tables and plots have a line or a point for, from its result files."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pshare_jax.study.config import ORDINARY, Tail, tail_name

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
NAIVE_SHARE = "test, share 1.0"
_LAYERS = "validation, layers "
_SHARE = "test, share "


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seeds alone, evaluated in one way.

    Args:
        name: method and tail in words, or what else is done with those weights.
        runs: their results, one a seed.
        evaluation: the name of one that all of them have.
    """

    name: str
    runs: Sequence[Result]
    evaluation: str = "test"

    @property
    def method(self) -> str:
        """A key of `METHODS`."""
        return self.runs[0]["method"]

    @property
    def examples(self) -> int:
        """That each run was trained on; 0 of the base."""
        return self.runs[0].get("examples", 0)

    def accuracies(self) -> list[float]:
        """Of each item: the share of the runs that were right, 0 to 1."""
        flags = [self.correct(run) for run in self.runs]
        return [statistics.mean(item) for item in zip(*flags, strict=True)]

    def correct(self, run: Result) -> list[bool]:
        """Which items one of the runs got right."""
        return [right == "1" for right in run["evaluations"][self.evaluation]["correct"]]

    def saved(self, others: Sequence[Result]) -> float | None:
        """The mean of `saved` over the runs; None where one cannot be told."""
        found = [saved(run, self.evaluation, others) for run in self.runs]
        return None if None in found else statistics.mean(found)  # type: ignore[type-var]


def rows_of(results: Sequence[Result]) -> list[Row]:
    """The rows of one task, in the order of `METHODS`; runs without a test set have none."""
    groups: dict[tuple[str, int, Tail, float], list[Result]] = defaultdict(list)
    for result in results:
        if "test" in result["evaluations"]:
            key = (result["method"], result.get("examples", 0), result.get("tail", 1))
            groups[*key, result.get("learning_rate", 0.0)].append(result)
    rates = Counter(key[:3] for key in groups)
    rows = []
    for key, group in groups.items():
        method = key[0]
        # What differs in nothing else is told apart by it.
        also = f", learning rate {key[3]:g}" if rates[key[:3]] > 1 else ""
        rows.append(Row(name_of(group[0]) + also, group))
        if method in ORDINARY and all(NAIVE_SHARE in r["evaluations"] for r in group):
            rows.append(Row(f"{NAIVE} ({METHODS[method]}{also})", group, NAIVE_SHARE))
        for name in best_layers(group):
            label = f"{name.removeprefix('test, ')} computed anew ({METHODS[method]}{also})"
            rows.append(Row(label, group, name))
    return sorted(rows, key=lambda row: (*place(row), row.examples))


def place(row: Row) -> tuple[int, float, str]:
    """What orders rows: method, length of the tail, and how they are evaluated."""
    tail = row.runs[0].get("tail", 1)
    # What was trained for its way to read stands before naive sharing of the same weights.
    way = "" if row.evaluation == "test" else row.evaluation
    return list(METHODS).index(row.method), tail if isinstance(tail, int) else math.inf, way


def name_of(result: Result) -> str:
    """Method and tail in words."""
    tail = result.get("tail", 1)
    plain = tail == 1 and result["method"] not in ("prefillshare", "lora")
    return METHODS[result["method"]] + ("" if plain else f", {tail_name(tail)}")


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


def saved(result: Result, evaluation: str, others: Sequence[Result]) -> float | None:
    """The share, 0 to 1, of prefill that the module did not compute; None where it is unknown.

    Results of earlier versions do not state it; it follows from the mean length of the prompts,
    which any other result on the task tells: a module computes its tail, or with a share of the
    base's KV the last token at least.

    Args:
        result: of one run.
        evaluation: one of its evaluations.
        others: results on the same task.
    """
    found = result["evaluations"][evaluation]
    if "saved" in found:
        return found["saved"]
    if not evaluation.startswith(_SHARE) and result["method"] in ORDINARY:
        return 0.0
    mean = _mean_prompt(others)
    if evaluation.startswith(_SHARE):
        share = float(evaluation.removeprefix(_SHARE))
        return share if mean is None else min(share, 1 - 1 / mean)
    if mean is None or not isinstance(result.get("tail"), int):
        return None
    return max(1 - result["tail"] / mean, 0.0)


def _mean_prompt(results: Sequence[Result]) -> float | None:
    """Mean tokens of the test set's prompts, where a result tells it."""
    for result in results:
        test = result["evaluations"].get("test", {})
        if "prompt_tokens" in test:
            return test["prompt_tokens"] / len(test["correct"])
    return None


def pairs(row: Row, references: Sequence[Row]) -> Iterator[tuple[Result, Result]]:
    """Runs of one of the references and of `row`, of the same seed.

    Args:
        row: what is compared.
        references: rows of one method; the one with as many examples as `row` counts, or else the
            one with the most of those that have fewer.
    """
    fitting = [other for other in references if other.examples <= row.examples]
    if not fitting:
        return
    reference = max(fitting, key=lambda other: other.examples)
    by_seed = {run["seed"]: run for run in reference.runs}
    for run in row.runs:
        if run.get("seed") in by_seed:
            yield by_seed[run["seed"]], run
