"""Two results on the same items, compared item by item."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pshare_jax.errors import EvaluationError
from pshare_jax.evals.intervals import Interval, McNemar, mcnemar, paired_bootstrap_interval


@dataclass(frozen=True)
class Comparison:
    """Two results: a and b.

    Args:
        items: how many.
        same_answers: on how many of them both have the same answer, letter by letter.
        accuracy_a: of the first.
        accuracy_b: of the second.
        difference: accuracy b - accuracy a.
        difference_95: its 95 % bootstrap interval, items resampled in pairs.
        mcnemar: McNemar's exact test.
    """

    items: int
    same_answers: int
    accuracy_a: float
    accuracy_b: float
    difference: float
    difference_95: Interval
    mcnemar: McNemar


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> Comparison:
    """Compares two results of `run.evaluate`, paired by item id.

    Raises:
        EvaluationError: their data differ.
    """
    if a["data"]["sha256"] != b["data"]["sha256"]:
        raise EvaluationError(
            f"the results are of different data: {a['data']['file']} ({a['data']['sha256'][:12]}) "
            f"and {b['data']['file']} ({b['data']['sha256'][:12]})"
        )
    first = {answer["id"]: bool(answer["correct"]) for answer in a["answers"]}
    second = {answer["id"]: bool(answer["correct"]) for answer in b["answers"]}
    if alone := sorted(first.keys() ^ second.keys()):
        raise EvaluationError(
            f"{len(alone)} items are in one result only, such as {alone[0]}; evaluate both with "
            "the same --limit"
        )
    ids = list(first)
    outputs = {answer["id"]: answer["output"] for answer in a["answers"]}
    same = sum(outputs[answer["id"]] == answer["output"] for answer in b["answers"])
    flags_a, flags_b = [first[name] for name in ids], [second[name] for name in ids]
    accuracy_a, accuracy_b = sum(flags_a) / len(ids), sum(flags_b) / len(ids)
    return Comparison(
        len(ids),
        same,
        accuracy_a,
        accuracy_b,
        accuracy_b - accuracy_a,
        paired_bootstrap_interval(flags_a, flags_b),
        mcnemar(flags_a, flags_b),
    )
