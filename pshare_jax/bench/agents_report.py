"""The tables of `bench agents` for the terminal."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from rich.table import Table

from pshare_jax.bench.agents_compare import Run, select

_COLUMNS: tuple[tuple[str, Callable[[Run], float | None], str], ...] = (
    ("tok/s", lambda run: run["generated_tokens_per_s"], "{:,.1f}"),
    ("calls/s", lambda run: run["calls_per_s"], "{:,.2f}"),
    ("TTFT p50", lambda run: run["ttft_s"]["p50"], "{:,.2f} s"),
    ("TTFT p95", lambda run: run["ttft_s"]["p95"], "{:,.2f} s"),
    ("call p50", lambda run: run["call_s"]["p50"], "{:,.2f} s"),
    ("call p95", lambda run: run["call_s"]["p95"], "{:,.2f} s"),
    ("session p95", lambda run: run["session_s"]["p95"], "{:,.1f} s"),
    ("cached", lambda run: _share(run, "cached"), "{:.0%}"),
    ("by others", lambda run: _share(run, "other_model"), "{:.0%}"),
)


def columns() -> list[tuple[str, Callable[[list[Run]], str]]]:
    """Heading and text of each figure of a group of runs: the median over the rounds."""
    return [
        (name, functools.partial(_cell, value=value, text=text)) for name, value, text in _COLUMNS
    ]


def groups(result: dict[str, Any]) -> Iterator[tuple[str, int, int, list[Run]]]:
    """Target, models, concurrency and the runs of all rounds."""
    runs = result["runs"]
    for models in sorted({run["models"] for run in runs}):
        for concurrency in sorted({run["concurrency"] for run in runs}):
            for target in result["targets"]:
                found = select(runs, target=target["name"], models=models, concurrency=concurrency)
                yield target["name"], models, concurrency, found


def runs_table(result: dict[str, Any]) -> Table:
    """One row for each target, number of models and concurrency: medians over the rounds."""
    workload = result["options"]["workload"]
    table = Table(title=f"{workload['pattern']}: medians of {result['options']['rounds']} rounds")
    for header in ("models", "live sessions", "target"):
        table.add_column(header)
    for header, _ in columns():
        table.add_column(header, justify="right")
    for target, models, concurrency, runs in groups(result):
        cells = [cell(runs) for _, cell in columns()]
        table.add_row(str(models), str(concurrency), target, *cells)
    return table


def lines(result: dict[str, Any]) -> Iterator[str]:
    """Ratios and limits, a sentence each."""
    for row in result["comparisons"]:
        best = row["best"]
        sides = " and ".join(f"{n} with {c}" for n, c in best["concurrency"].items())
        yield (
            f"{row['models']} models, {row['target']} against {row['baseline']}, each at its best "
            f"({sides} live sessions): throughput {times(best['throughput'])}, p95 of calls "
            f"{times(best['p95_call_s'])} lower, of sessions {times(best['p95_session_s'])} lower"
        )
    for row in result["limits"]:
        yield (
            f"{row['models']} models: rho {row['rho']:.2f}, prefill {row['prefill_s']:.3f} s and "
            f"decode {row['decode_s']:.3f} s a session, G_max {row['g_max']:.2f}, achieved "
            f"{row['achieved']:.2f} ({row['achieved_of_g_max']:.0%})"
        )


def times(ratio: dict[str, float]) -> str:
    """A ratio with its range, for people."""
    return f"{ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})"


def _cell(runs: list[Run], value: Callable[[Run], float | None], text: str) -> str:
    values = [value(run) for run in runs]
    known = [v for v in values if v is not None]
    return text.format(statistics.median(known)) if len(known) == len(values) else "-"


def _share(run: Run, origin: str) -> float | None:
    tokens = run["prompt_tokens"]
    return None if tokens[origin] is None else tokens[origin] / tokens["total"]
