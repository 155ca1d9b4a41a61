"""Predictions for machines that are not here: which layouts fit, which is best, what it gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pshare_jax.bench import limits
from pshare_jax.bench.accelerators import ACCELERATORS
from pshare_jax.bench.agents_load import Load
from pshare_jax.bench.agents_workload import Workload
from pshare_jax.bench.compile_models import MODELS
from pshare_jax.bench.plan.bounds import Bound, bound
from pshare_jax.bench.plan.costs import Efficiency
from pshare_jax.bench.plan.machines import (
    Engines,
    Layout,
    Machine,
    Modules,
    fit,
    isolated_layouts,
    memory_rows,
    split_layouts,
    system_spec,
)
from pshare_jax.bench.plan.play import simulate
from pshare_jax.errors import ConfigError

_BASELINES = 3
"""Splits that are simulated for models that do not share."""


@dataclass(frozen=True)
class MachineOptions:
    """Devices of one kind.

    Args:
        accelerator: a name of `bench compile`'s table.
        devices: how many.
    """

    accelerator: str
    devices: int = 8


@dataclass(frozen=True)
class PredictOptions:
    """What is predicted.

    Args:
        model: a name of `bench compile`'s models.
        machines: machines without which this runs.
        models: numbers of models; each session makes as many calls as `workload` has.
        modules: `full`, `lora`, or both.
        workload: the shape of a session.
        concurrency: live sessions of the curves; the largest is where splits are compared.
        sessions: played for each live one.
        efficiency: what is assumed of the hardware.
        engines: settings of the engines.
        compiled: result of `bench compile`, whose decode steps' bytes accessed over least take the
            place of `efficiency.extra_bytes` where the compiler gives them. It counts more than is
            moved, see docs/accelerators.md, so these are the cautious predictions.
    """

    model: str = "Llama-3.1-8B"
    machines: list[MachineOptions] = field(default_factory=list)
    models: list[int] = field(default_factory=lambda: [4, 8])
    modules: list[Modules] = field(default_factory=lambda: ["full", "lora"])
    workload: Workload = field(default_factory=Workload)
    concurrency: list[int] = field(default_factory=lambda: [8, 32, 64])
    sessions: int = 2
    efficiency: Efficiency = field(default_factory=Efficiency)
    engines: Engines = field(default_factory=Engines)
    compiled: str | None = None

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ConfigError(f"model: unknown {self.model!r}; choose from {', '.join(MODELS)}")
        for machine in self.machines:
            if machine.accelerator not in ACCELERATORS:
                raise ConfigError(
                    f"machines: unknown {machine.accelerator!r}; choose from "
                    f"{', '.join(ACCELERATORS)}"
                )
            if machine.devices < 2:
                raise ConfigError(f"machines: needs at least 2 devices, got {machine.devices}")
        calls = self.workload.models * self.workload.turns
        for count in self.models:
            if count < 1 or calls % count:
                raise ConfigError(f"models: {calls} calls cannot be divided among {count} models")
        if not self.concurrency or min(self.concurrency) < 1 or self.sessions < 1:
            raise ConfigError("concurrency, sessions: must be numbers from 1 up")
        if max(self.concurrency) > max(self.engines.batch_buckets):
            raise ConfigError("concurrency: more than engines.batch_buckets allow in one batch")

    def workload_of(self, models: int) -> Workload:
        """The session with that many models and as many calls."""
        turns = self.workload.models * self.workload.turns // models
        return replace(self.workload, models=models, turns=turns)


def cases(options: PredictOptions) -> Iterator[tuple[Machine, int, Modules]]:
    """Everything that is predicted: machine, number of models, kind of modules."""
    compiled = [] if options.compiled is None else _read_compiled(options.compiled)
    for wanted in options.machines:
        chip, model = ACCELERATORS[wanted.accelerator], MODELS[options.model]
        extra = _extra_bytes(compiled, chip.name, options.model)
        reached = (
            options.efficiency if extra is None else replace(options.efficiency, extra_bytes=extra)
        )
        machine = Machine(chip, wanted.devices, model, reached, options.engines)
        for models in options.models:
            for modules in options.modules:
                yield machine, models, modules


def _read_compiled(file: str) -> list[dict[str, Any]]:
    try:
        return json.loads(Path(file).read_text())["outcomes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"compiled: {file} is no result of `bench compile`: {error}") from error


def _extra_bytes(outcomes: Sequence[dict[str, Any]], accelerator: str, model: str) -> float | None:
    """Bytes accessed over least of a machine's decode step; None where the compiler gives none."""
    for row in outcomes:
        names = row["accelerator"], row["model"], row["program"]
        found = row["compiled"]
        if names == (accelerator, model, "decode step") and found and found["accessed_bytes"]:
            return found["accessed_bytes"] / found["least_bytes"]
    return None


def predict(
    options: PredictOptions, machine: Machine, models: int, modules: Modules
) -> dict[str, Any]:
    """One case, as plain data; every figure is a prediction.

    For each split of the devices that has fitting layouts, the one with the highest closed-form
    bound is simulated at the largest concurrency. The best split, and the best layout of models
    that do not share, are simulated over all concurrencies.
    """
    workload = options.workload_of(models)
    case = _Case(options, machine, workload)
    shared = list(split_layouts(machine, models, modules, shared=True))
    fitting = [layout for layout in shared if case.fits(layout)]
    splits = [case.simulated(layout) for layout in case.best_of_each_split(fitting)]
    baselines = [layout for layout in case.baselines(models, modules) if case.fits(layout)]
    alone = [case.simulated(layout) for layout in baselines]
    result: dict[str, Any] = {
        "machine": machine.name,
        "model": options.model,
        "models": models,
        "modules": modules,
        "extra_bytes": machine.efficiency.extra_bytes,
        "layouts": len(shared),
        "fitting": len(fitting),
        "splits": [row for row, _ in splits],
        "isolated_layouts": [row for row, _ in alone],
    }
    if splits:
        best, layout = max(splits, key=lambda pair: _throughput(pair[0]))
        result |= {"best": best, "curve": case.curve(layout, best)}
    if alone:
        best, layout = max(alone, key=lambda pair: _throughput(pair[0]))
        result |= {"isolated": best, "isolated_curve": case.curve(layout, best)}
    if splits:
        result["limit"] = _limit(result, workload, machine)
    return result


@dataclass(frozen=True)
class _Case:
    options: PredictOptions
    machine: Machine
    workload: Workload

    @property
    def busiest(self) -> int:
        return max(self.options.concurrency)

    def fits(self, layout: Layout) -> bool:
        return fit(self.machine, layout, self.workload.longest).fits

    def baselines(self, models: int, modules: Modules) -> list[Layout]:
        """Layouts of models that do not share.

        LoRA modules keep the base's weights once on every engine, in prefill too, so that only the
        KV is each model's own; the best splits by the bound are taken.
        """
        if modules == "full":
            return list(isolated_layouts(self.machine, models))
        layouts = list(split_layouts(self.machine, models, "lora", shared=False))
        splits = self.best_of_each_split([layout for layout in layouts if self.fits(layout)])
        splits.sort(key=lambda layout: self.bound(layout).sessions_per_s, reverse=True)
        return splits[:_BASELINES]

    def best_of_each_split(self, layouts: Sequence[Layout]) -> list[Layout]:
        best: dict[int, Layout] = {}
        for layout in layouts:
            found = best.setdefault(layout.prefill_devices, layout)
            if self.bound(layout).sessions_per_s > self.bound(found).sessions_per_s:
                best[layout.prefill_devices] = layout
        return list(best.values())

    def bound(self, layout: Layout) -> Bound:
        machine, engines = self.machine, self.options.engines
        memory = fit(machine, layout, self.workload.longest)
        prefill = layout.prefill_devices // layout.prefill_mesh
        decode = layout.loaded_engines
        room = decode * memory.decode_tokens / self.workload.longest
        adapters = layout.models if layout.modules == "lora" else 0
        return bound(
            (machine.costs(layout.prefill_mesh), machine.costs(layout.decode_mesh, adapters)),
            (prefill, decode),
            self.workload,
            (engines.chunk_buckets, engines.batch_buckets),
            engines.page_size,
            shared=layout.shared,
            groups=1 if layout.modules == "lora" else layout.hosted,
            live=min(self.busiest, room),
        )

    def simulated(self, layout: Layout) -> tuple[dict[str, Any], Layout]:
        """A row of figures at the largest concurrency, and the layout itself."""
        memory = asdict(fit(self.machine, layout, self.workload.longest))
        row = {"split": layout.split, "layout": layout.name, "memory": memory}
        return row | asdict(layout) | self._figures(layout, self.busiest), layout

    def curve(self, layout: Layout, busiest: dict[str, Any]) -> list[dict[str, Any]]:
        """Figures over all concurrencies; `busiest` is the row of the largest."""
        others = sorted(live for live in self.options.concurrency if live != self.busiest)
        return [*(self._figures(layout, live) for live in others), busiest]

    def _figures(self, layout: Layout, live: int) -> dict[str, Any]:
        load = Load(self.options.sessions * live, live, 0.0, 0)
        run = simulate(system_spec(self.machine, layout), self.workload, load)
        work = run["engines"]
        busy = {"prefill": work["prefill_busy"], "decode": work["decode_busy"]}
        return {
            "concurrency": live,
            "generated_tokens_per_s": run["generated_tokens_per_s"],
            "sessions_per_s": run["sessions_per_s"],
            "ttft_s": run["ttft_s"],
            "call_s": run["call_s"],
            "session_s": run["session_s"],
            "cached": run["prompt_tokens"]["cached"] / run["prompt_tokens"]["total"],
            "prefill_busy": busy["prefill"],
            "decode_busy": busy["decode"],
            "limit": max(busy, key=lambda side: busy[side]),
            "prefill_device_s": work["prefill_s"] * layout.prefill_mesh / run["sessions"],
            "decode_device_s": work["decode_s"] * layout.decode_mesh / run["sessions"],
            "sequences_per_step": work["sequences_per_step"],
            "preemptions": work["preemptions"],
        }


def _throughput(row: dict[str, Any]) -> float:
    return row["generated_tokens_per_s"]


def _limit(result: dict[str, Any], workload: Workload, machine: Machine) -> dict[str, Any]:
    """rho, and G_max from the shared run's device seconds of prefill and decode."""
    best, isolated = result["best"], result.get("isolated")
    calls = workload.calls()
    rho = limits.rho(calls)
    prefill, decode = best["prefill_device_s"], best["decode_device_s"]
    g_max = limits.g_max(rho, prefill, decode)
    found = {
        "rho": rho,
        "prefill_device_s": prefill,
        "decode_device_s": decode,
        "balanced_prefill_devices": machine.devices * prefill / (prefill + decode),
        "g_max": g_max,
        "gain": None,
        "gain_of_g_max": None,
        "p95_call_gain": None,
    }
    if isolated is not None:
        top, other = (
            max(_throughput(row) for row in result[curve]) for curve in ("curve", "isolated_curve")
        )
        found["gain"] = top / other
        found["gain_of_g_max"] = top / other / g_max
        found["p95_call_gain"] = isolated["call_s"]["p95"] / best["call_s"]["p95"]
    return found


def memory(options: PredictOptions) -> list[dict[str, Any]]:
    """What fits on each machine, see `machines.memory_rows`."""
    most = max(options.models, default=0)
    machines = {machine.name: machine for machine, _, _ in cases(options)}
    longest = max((options.workload_of(count).longest for count in options.models), default=0)
    return [row for machine in machines.values() for row in memory_rows(machine, most, longest)]


def run(
    options: PredictOptions, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[dict[str, Any]]:
    """All cases; `progress` gets those done and those to do."""
    todo = list(cases(options))
    found = []
    for done, (machine, models, modules) in enumerate(todo):
        progress(done, len(todo))
        found.append(predict(options, machine, models, modules))
    progress(len(todo), len(todo))
    return found
