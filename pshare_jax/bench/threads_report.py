"""Tables of `bench threads`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

_ENOUGH = 1.1
"""More threads are worth it where they give as many times the speed."""


def lines(result: dict[str, Any]) -> list[str]:
    """Markdown tables of a result: each workload by threads, and what its time goes to."""
    rows = [
        f"Predicted, not measured, beyond {result['cores']} threads; all cores read "
        f"{result['gb_per_s']:.0f} GB/s; {result['line_ns']:.0f} ns of a line of memory from core "
        "to core.",
    ]
    for name, workload in result["workloads"].items():
        rows += ["", f"**{name}**", "", *_table(workload), "", _limit(workload["predicted"])]
        rows += ["", *_stages(workload["predicted"])]
    return rows


def scales_to(predicted: Mapping[int, Mapping[str, Any]]) -> int:
    """The last team that is worth its threads, beside the next smaller one."""
    teams = sorted(predicted)
    best = teams[0]
    for fewer, more in itertools.pairwise(teams):
        if predicted[fewer]["seconds"] < _ENOUGH * predicted[more]["seconds"]:
            break
        best = more
    return best


def errors(workload: Mapping[str, Any]) -> dict[int, float]:
    """By threads, predicted over measured less 1."""
    return {
        threads: workload["predicted"][threads]["seconds"] / seconds - 1
        for threads, seconds in workload["measured"].items()
    }


def _table(workload: Mapping[str, Any]) -> list[str]:
    predicted = workload["predicted"]
    one = predicted[min(predicted)]["seconds"] * min(predicted)
    rows = [
        "| threads | ms a step | measured | error | speed-up | efficiency | "
        "loops | of it memory | C++ between loops | XLA between calls | between steps | host |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    wrong = errors(workload)
    for threads, found in sorted(predicted.items()):
        seconds = found["seconds"]
        memory = sum(stage["memory"] for stage in found["stages"].values())
        real = workload["measured"].get(threads)
        cells = [
            str(threads),
            _ms(seconds),
            "" if real is None else _ms(real),
            "" if real is None else f"{100 * wrong[threads]:+.0f} %",
            f"{one / seconds:.2f}",
            f"{100 * one / seconds / threads:.0f} %",
            *map(_ms, (found["loops"], memory, found["cpp"], found["xla"], found["gap"])),
            _ms(found["host"]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _limit(predicted: Mapping[int, Mapping[str, Any]]) -> str:
    most = predicted[max(predicted)]
    serial = most["seconds"] - most["loops"]
    slow = sorted(most["stages"].items(), key=lambda item: -item[1]["seconds"])[:3]
    stages = ", ".join(f"{name} {_ms(stage['seconds'])}" for name, stage in slow)
    return (
        f"More threads give less than {100 * (_ENOUGH - 1):.0f} % beyond "
        f"{scales_to(predicted)}. With {max(predicted)}, {100 * serial / most['seconds']:.0f} % of "
        f"a step is on one thread; the longest loops are, in ms: {stages}."
    )


def _stages(predicted: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Loops by stage: how many iterations there are to share out, and what they take."""
    teams = sorted(predicted)
    rows = [
        "| stage | loops | one thread, ms | "
        + " | ".join(f"{n}: iterations | ms" for n in teams[1:])
        + " |",
        "|---|--:|--:|" + "--:|--:|" * len(teams[1:]),
    ]
    for stage, alone in predicted[teams[0]]["stages"].items():
        cells = [stage, f"{alone['loops']:.0f}", _ms(alone["seconds"])]
        for threads in teams[1:]:
            found = predicted[threads]["stages"].get(stage)
            if found is None:
                cells += ["", ""]
                continue
            cells += [f"{found['iterations'] / found['loops']:.0f}", _ms(found["seconds"])]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"
