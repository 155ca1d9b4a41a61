"""`bench plan`: what the system would do on other hardware, and how far that can be believed.

Two sources of costs: steps that `bench micro` measured on this machine, with which the runs of a
result of `bench agents` are predicted and compared; and rooflines of accelerators that are not
here. Both go through the same simulation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pshare_jax.bench.plan import predict
from pshare_jax.bench.plan.calibrate import read_results, table_costs
from pshare_jax.bench.plan.costs import TableCosts
from pshare_jax.bench.plan.passes import token_seconds
from pshare_jax.bench.plan.validate import Host, ratios, read_agents, validate


@dataclass(frozen=True)
class PlanOptions:
    """What is predicted, from what.

    Args:
        micro: results of `bench micro` on the machine of `validate`.
        rate: which of the measured repeats counts: the median, or on a disturbed machine the
            fastest (`high`).
        host: what else of that machine the simulation must know.
        validate: result of `bench agents` to compare with.
        server_args: flags of its servers beside those that it names: what was another default then.
        predict: machines that are not here.
    """

    micro: list[str] = field(default_factory=list)
    rate: Literal["median", "high"] = "median"
    host: Host = field(default_factory=Host)
    validate: str | None = None
    server_args: list[str] = field(default_factory=list)
    predict: predict.PredictOptions = field(default_factory=predict.PredictOptions)


def run(
    options: PlanOptions, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """`{"options", "memory", "predictions", "validation", "validation_ratios"}`, plain data.

    Args:
        options: what to do.
        progress: gets the predictions made so far and those to make.

    Raises:
        ConfigError: files that cannot be read or do not hold enough.
    """
    found: dict[str, Any] = {"options": asdict(options), "validation": [], "validation_ratios": []}
    if options.validate is not None:
        measured = read_agents(options.validate)
        costs = _costs(options)
        found["validation"] = validate(
            measured, costs, options.host.call_seconds, options.server_args
        )
        found["validation_ratios"] = ratios(found["validation"])
        found["measured_on"] = measured.get("machine")
    found["memory"] = predict.memory(options.predict)
    found["predictions"] = predict.run(options.predict, progress)
    return found


def _costs(options: PlanOptions) -> Callable[[bool], TableCosts]:
    """Costs of a server with LoRA modules, or with full ones."""
    micro, host = read_results(options.micro), options.host

    @functools.cache
    def measured(lora: bool) -> TableCosts:
        return table_costs(micro, options.rate, lora)

    beside = host.token_seconds
    if host.passes:
        beside = token_seconds([read_agents(file) for file in host.passes], measured)

    def served(lora: bool) -> TableCosts:
        return replace(measured(lora), token_seconds=beside)

    return served
