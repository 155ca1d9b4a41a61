"""Predicted against measured: the runs of a result of `bench agents`, simulated."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pshare_jax.bench.agents_load import Load
from pshare_jax.bench.agents_targets import ISOLATED, SHARED
from pshare_jax.bench.plan.costs import TableCosts
from pshare_jax.bench.plan.passes import workload_of
from pshare_jax.bench.plan.play import simulate
from pshare_jax.bench.plan.served import is_lora, load_server, server_spec
from pshare_jax.bench.plan.specs import SystemSpec
from pshare_jax.config import ServeConfig
from pshare_jax.errors import ConfigError

FIGURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "generated_tokens_per_s": lambda run: run["generated_tokens_per_s"],
    "ttft_p95_s": lambda run: run["ttft_s"]["p95"],
    "call_p50_s": lambda run: run["call_s"]["p50"],
    "call_p95_s": lambda run: run["call_s"]["p95"],
    "session_p95_s": lambda run: run["session_s"]["p95"],
}
"""What is compared; all runs of `bench agents` have it."""


@dataclass(frozen=True)
class Host:
    """What of a CPU the costs of steps do not tell.

    Args:
        call_seconds: of a call outside the engines.
        token_seconds: work of the server and the client for each token that is sent.
        passes: results of `bench agents` on the machine whose limits tell `token_seconds`, see
            `passes`.
    """

    call_seconds: float = 0.0
    token_seconds: float = 0.0
    passes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if min(self.call_seconds, self.token_seconds) < 0:
            raise ConfigError("host: seconds must not be negative")
        if self.passes and self.token_seconds:
            raise ConfigError("host: token_seconds or passes, not both")


def read_agents(file: str) -> dict[str, Any]:
    """A result file of `bench agents`.

    Raises:
        ConfigError: it cannot be read or is something else.
    """
    try:
        result = json.loads(Path(file).read_text())
        known = {"options", "targets", "runs"} <= result.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"validate: {file} cannot be read: {error}") from error
    if not known:
        raise ConfigError(f"validate: {file} is no result of `bench agents`")
    return result


def validate(
    result: dict[str, Any],
    costs: Callable[[bool], TableCosts],
    call_seconds: float = 0.0,
    server_args: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """One row for each server, number of models and concurrency of a result.

    A figure is the median over rounds; `error` is predicted over measured, less one.

    Args:
        result: of `bench agents`, with servers that it started.
        costs: those of LoRA modules, or of full ones.
        call_seconds: see `Host`.
        server_args: flags of its servers beside those that it names.

    Raises:
        ConfigError: the result has no such servers, or their configurations cannot be read.
    """
    options = result["options"]
    files = {name: options.get(name) for name in (SHARED, ISOLATED)} | options.get("variants", {})
    args = [*options["server_args"], *server_args]
    configs = {name: load_server(file, args) for name, file in files.items() if file}
    if not configs:
        raise ConfigError("validate: the result has no server that `bench agents` started")
    return [
        _row(name, runs, _simulated(options, config, runs, costs(is_lora(config)), call_seconds))
        for name, config in configs.items()
        for runs in _points(result, name)
    ]


def _points(result: dict[str, Any], target: str) -> Iterator[list[dict[str, Any]]]:
    points: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for run in result["runs"]:
        if run["target"] == target:
            points.setdefault((run["models"], run["concurrency"]), []).append(run)
    yield from (points[key] for key in sorted(points))


def _simulated(
    options: dict[str, Any],
    config: ServeConfig,
    runs: Sequence[dict[str, Any]],
    costs: TableCosts,
    call_seconds: float,
) -> list[dict[str, Any]]:
    models = runs[0]["models"]
    workload = workload_of(options, models)
    spec = SystemSpec([server_spec(config, models, costs, 0)], call_seconds)
    seeds = [run["seed"] for run in runs] if options["rate"] else [0]
    return [
        simulate(
            spec,
            workload,
            Load(runs[0]["sessions"], runs[0]["concurrency"], options["rate"], seed),
            options["warmup"],
        )
        for seed in seeds
    ]


def _row(
    target: str, measured: Sequence[dict[str, Any]], predicted: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    first = measured[0]
    row: dict[str, Any] = {
        "target": target,
        "models": first["models"],
        "concurrency": first["concurrency"],
        "predicted": {},
        "measured": {},
        "error": {},
    }
    for name, value in FIGURES.items():
        forecast, found = (statistics.median(map(value, runs)) for runs in (predicted, measured))
        row["predicted"][name], row["measured"][name] = forecast, found
        row["error"][name] = forecast / found - 1
    return row


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Shared over isolated throughput, each at its best concurrency, measured and predicted."""
    found = []
    for models in sorted({row["models"] for row in rows}):
        pair = {}
        for side in ("predicted", "measured"):
            best = {
                target: max(
                    (
                        row[side]["generated_tokens_per_s"]
                        for row in rows
                        if (row["target"], row["models"]) == (target, models)
                    ),
                    default=0.0,
                )
                for target in (SHARED, ISOLATED)
            }
            if min(best.values()) > 0:
                pair[side] = best[SHARED] / best[ISOLATED]
        if len(pair) == 2:
            error = pair["predicted"] / pair["measured"] - 1
            found.append({"models": models, **pair, "error": error})
    return found
