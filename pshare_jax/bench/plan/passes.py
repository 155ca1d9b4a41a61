"""What a token takes in a server beside what `bench micro` sees of it.

Tokens are turned into text and events, and a client on the same cores reads them: work for each
token, whatever the steps that they come from. `bench agents` measures decode apart, see
`agents_calibrate`: sessions in lockstep, all prompts cached. These are other runs than those that
are predicted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pshare_jax.bench.agents_compare import best_concurrency
from pshare_jax.bench.agents_targets import SHARED
from pshare_jax.bench.agents_workload import Workload
from pshare_jax.bench.plan.bounds import decode_seconds
from pshare_jax.bench.plan.costs import CostModel
from pshare_jax.bench.plan.served import is_lora, load_server
from pshare_jax.errors import ConfigError


def token_seconds(
    results: Sequence[Mapping[str, Any]], costs: Callable[[bool], CostModel]
) -> float:
    """Seconds that each token took longer than `costs` say; the median over all passes.

    Args:
        results: of `bench agents`, with limits.
        costs: those of LoRA modules, or of full ones, as measured by `bench micro`.

    Raises:
        ConfigError: no result has limits, or a server's configuration cannot be read.
    """
    found = [
        seconds for result in results for seconds in _differences(result, costs) if result["limits"]
    ]
    if not found:
        raise ConfigError("host.passes: no result of `bench agents` with limits")
    return max(statistics.median(found), 0.0)


def _differences(result: Mapping[str, Any], costs: Callable[[bool], CostModel]) -> list[float]:
    options = result["options"]
    config = load_server(options[SHARED], options["server_args"])
    return [
        _difference(
            limit["decode_s"],
            workload_of(options, limit["models"]),
            best_concurrency(result["runs"], SHARED, limit["models"]),
            config.decode.batch_buckets,
            costs(is_lora(config)),
        )
        for limit in result["limits"]
    ]


def _difference(
    measured: float, workload: Workload, rows: int, batch_buckets: Sequence[int], costs: CostModel
) -> float:
    tokens = len(workload.calls()) * workload.generated
    return (measured - decode_seconds(costs, workload, batch_buckets, rows)) / tokens


def workload_of(options: Mapping[str, Any], models: int) -> Workload:
    """The sessions that `bench agents` played with that many models: as many calls in all."""
    shape = options["workload"]
    calls = shape["models"] * shape["turns"]
    return Workload(**{**shape, "models": models, "turns": calls // models})
