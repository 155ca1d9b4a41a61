"""Ratios of interleaved runs, and how near they come to the most that sharing can give."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from pshare_jax.bench import limits
from pshare_jax.bench.agents_calibrate import Costs
from pshare_jax.bench.agents_workload import Workload

Run = dict[str, Any]


def select(runs: Sequence[Run], **fields: Any) -> list[Run]:
    """The runs that have these values, in order of their rounds."""
    found = [run for run in runs if all(run[key] == value for key, value in fields.items())]
    return sorted(found, key=lambda run: run["round"])


def throughput(run: Run) -> float:
    """Generated tokens a second."""
    return run["generated_tokens_per_s"]


def p95(kind: str) -> Callable[[Run], float]:
    """A run's p95 latency in seconds; `kind` is `call_s`, `session_s` or `ttft_s`."""
    return lambda run: run[kind]["p95"]


def best_concurrency(runs: Sequence[Run], target: str, models: int) -> int:
    """The one with the target's highest median throughput."""
    mine = select(runs, target=target, models=models)
    return max(
        {run["concurrency"] for run in mine},
        key=lambda c: statistics.median(throughput(run) for run in select(mine, concurrency=c)),
    )


def compare(runs: Sequence[Run], target: str, baseline: str) -> list[dict[str, Any]]:
    """Target against baseline, for each number of models.

    Throughput ratios are target / baseline, latency ratios baseline / target: above 1 the target
    is better. Each has its median, lowest and highest over the rounds. Under `best`, each side
    has its own best concurrency; latency there is that of the concurrency with most throughput.
    """
    rows = []
    for models in sorted({run["models"] for run in runs}):
        here = select(runs, models=models)
        own, other = (best_concurrency(here, name, models) for name in (target, baseline))
        rows.append(
            {
                "target": target,
                "baseline": baseline,
                "models": models,
                "equal_concurrency": {
                    str(c): _ratios(here, (target, c), (baseline, c))
                    for c in sorted({run["concurrency"] for run in here})
                },
                "best": {
                    "concurrency": {target: own, baseline: other},
                    **_ratios(here, (target, own), (baseline, other)),
                },
            }
        )
    return rows


def _ratios(
    runs: Sequence[Run], target: tuple[str, int], baseline: tuple[str, int]
) -> dict[str, dict[str, float]]:
    mine, theirs = (select(runs, target=name, concurrency=c) for name, c in (target, baseline))
    pairs = list(zip(mine, theirs, strict=True))
    return {
        "throughput": _spread([throughput(a) / throughput(b) for a, b in pairs]),
        **{
            f"p95_{kind}": _spread([p95(kind)(b) / p95(kind)(a) for a, b in pairs])
            for kind in ("call_s", "session_s", "ttft_s")
        },
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def against_limit(comparison: dict[str, Any], workload: Workload, costs: Costs) -> dict[str, Any]:
    """rho, G_max and how much of it the best-against-best throughput ratio achieves.

    Args:
        comparison: a row of `compare`, shared against isolated.
        workload: the sessions of that row.
        costs: prefill and decode seconds of a session on the shared server.
    """
    calls = workload.calls()
    rho = limits.rho(calls)
    g_max = limits.g_max(rho, costs.prefill, costs.decode)
    achieved = comparison["best"]["throughput"]["median"]
    return {
        "models": workload.models,
        "rho": rho,
        "shared_prefill_tokens": limits.shared_prefill_tokens(calls),
        "isolated_prefill_tokens": limits.isolated_prefill_tokens(calls),
        "prefill_s": costs.prefill,
        "decode_s": costs.decode,
        "g_max": g_max,
        "achieved": achieved,
        "achieved_of_g_max": achieved / g_max,
    }
