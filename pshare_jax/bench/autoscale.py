"""`bench autoscale`: workers change sides while the load changes, in virtual time.

A flow of calls through prefill and decode workers whose speeds are those of `bench plan`'s
roofline: calls arrive at random, wait for a prefill worker, then for a slot, and run in steps that
take longer the more of them there are. It is coarser than `bench plan`, which runs the cores: it
shows what the policy of `core/autoscale.py` does over half an hour, beside each division
left alone.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec
import numpy as np

from pshare_jax.bench.accelerators import ACCELERATORS
from pshare_jax.bench.compile_models import MODELS
from pshare_jax.bench.plan.costs import Efficiency, Roofline, kv_bytes, weight_bytes
from pshare_jax.bench.plan.machines import Engines, Machine
from pshare_jax.core.autoscale import Autoscaler, Capacity, Observation, Policy, Split
from pshare_jax.core.buckets import bucket_for
from pshare_jax.errors import ConfigError


@dataclass(frozen=True)
class Phase:
    """A time in which calls are of one kind.

    Args:
        seconds: that it lasts.
        calls_per_s: calls that begin.
        computed: prompt tokens of a call that are not found.
        context: tokens of a call's KV.
        generated: tokens of its reply.
    """

    seconds: float = 600.0
    calls_per_s: float = 8.0
    computed: int = 2048
    context: int = 4096
    generated: int = 64


@dataclass(frozen=True)
class AutoscaleOptions:
    """What is simulated.

    Args:
        accelerator: a name of `bench compile`'s table; a worker has one device.
        model: a name of `bench compile`'s models.
        devices: workers of both sides together.
        prefill: prefill workers at the start.
        phases: what is asked, one after the other.
        step_seconds: that a decode step may take, which says how many sequences a worker runs.
        change_seconds: for which a worker that changes sides does nothing.
        observe_seconds: between two observations.
        policy: when what is changed; `devices` is the one above.
        efficiency: what is assumed of the hardware.
        seed: of the arrivals.
    """

    accelerator: str = "h100"
    model: str = "Llama-3.1-8B"
    devices: int = 8
    prefill: int = 2
    phases: list[Phase] = field(
        default_factory=lambda: [
            Phase(calls_per_s=24.0, computed=512, context=4096, generated=256),
            Phase(calls_per_s=24.0, computed=4096, context=8192, generated=64),
            Phase(calls_per_s=24.0, computed=512, context=4096, generated=256),
        ]
    )
    step_seconds: float = 0.02
    change_seconds: float = 45.0
    observe_seconds: float = 5.0
    policy: Policy = field(default_factory=Policy)
    efficiency: Efficiency = field(default_factory=Efficiency)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.accelerator not in ACCELERATORS:
            raise ConfigError(f"accelerator: choose from {', '.join(ACCELERATORS)}")
        if self.model not in MODELS:
            raise ConfigError(f"model: choose from {', '.join(MODELS)}")
        if not 1 <= self.prefill < self.devices:
            raise ConfigError("prefill: at least one worker, and one for decode")


TICK = 0.25
"""Seconds of a step of the simulation."""


def machine_of(options: AutoscaleOptions) -> Machine:
    """One device of the machine that is simulated."""
    chip, model = ACCELERATORS[options.accelerator], MODELS[options.model]
    return Machine(chip, 1, model, options.efficiency, Engines())


def capacity_of(machine: Machine, phase: Phase, step_seconds: float) -> Capacity:
    """What a worker of one device can do, as `bench plan` has it.

    Args:
        machine: the device and the model.
        phase: what is asked.
        step_seconds: that a decode step may take.
    """
    costs, engines = machine.costs(1), machine.engines
    chunk = max(engines.chunk_buckets)
    rate = chunk / costs.chunk(chunk, chunk, max(phase.context - chunk, 0))
    rows = 1
    while rows < engines.max_num_seqs and _step(costs, engines, rows + 1, phase) <= step_seconds:
        rows += 1
    pages = machine.pool_pages(1, weight_bytes(machine.model))
    return Capacity(rate, rows, pages)


def _step(costs: Roofline, engines: Engines, rows: int, phase: Phase) -> float:
    bucket = bucket_for(min(rows, max(engines.batch_buckets)), engines.batch_buckets)
    return costs.decode_step(bucket, rows, rows * phase.context)


class _Flow:
    """Calls on their way through two groups of workers."""

    def __init__(self, options: AutoscaleOptions, split: Split):
        self.split = split
        self.coming: list[tuple[float, str]] = []
        self.ended: list[tuple[float, float, float]] = []
        self.machine = machine_of(options)
        self._costs, self._engines = self.machine.costs(1), self.machine.engines
        self._options = options
        self._random = np.random.default_rng(options.seed)
        self._waiting: deque[list[Any]] = deque()
        self._covered: deque[list[Any]] = deque()
        self._running: list[list[Any]] = []
        self._credit = 0.0
        self.arrived_tokens = 0.0

    def tick(self, now: float, phase: Phase) -> None:
        """What happens in `TICK` seconds."""
        self.coming = [change for change in self.coming if change[0] > now]
        away = [side for _, side in self.coming]
        prefill = self.split.prefill - away.count("prefill")
        decode = self.split.decode - away.count("decode")
        for _ in range(self._random.poisson(phase.calls_per_s * TICK)):
            # Tokens to compute and to generate, the phase, when it came and when it was covered.
            self._waiting.append([float(phase.computed), float(phase.generated), phase, now, 0.0])
            self.arrived_tokens += phase.computed
        self._prefill(now, prefill)
        self._decode(now, decode)

    @property
    def waiting_tokens(self) -> float:
        """Prompt tokens to be computed."""
        return sum(call[0] for call in self._waiting)

    @property
    def sequences(self) -> int:
        """Sequences that run, or wait for a slot."""
        return len(self._running) + len(self._covered)

    @property
    def pages(self) -> float:
        """Pages of these."""
        calls = [*self._running, *self._covered]
        return sum(call[2].context for call in calls) / self._engines.page_size

    def _prefill(self, now: float, workers: int) -> None:
        chunk = max(self._engines.chunk_buckets)
        budget = workers * TICK
        while self._waiting and budget > 0:
            call = self._waiting[0]
            seconds = call[0] * self._costs.chunk(chunk, chunk, call[2].context - chunk) / chunk
            share = min(1.0, budget / seconds)
            call[0] *= 1 - share
            budget -= share * seconds
            if share == 1.0:
                call[4] = now
                self._covered.append(self._waiting.popleft())

    def _decode(self, now: float, workers: int) -> None:
        page = self._engines.page_size
        pool = self.machine.pool_pages(1, weight_bytes(self.machine.model)) * workers
        used = sum(call[2].context for call in self._running) / page
        while self._covered and len(self._running) < workers * self._engines.max_num_seqs:
            used += self._covered[0][2].context / page
            if used > pool:
                break
            self._running.append(self._covered.popleft())
        if not self._running or not workers:
            return
        rows = -(-len(self._running) // workers)
        context = sum(call[2].context for call in self._running) // len(self._running)
        step = _step(self._costs, self._engines, rows, Phase(context=context))
        for call in self._running:
            call[1] -= TICK / step
            if call[1] <= 0:
                self.ended.append((now, call[4] - call[3], step))
        self._running = [call for call in self._running if call[1] > 0]


def play(options: AutoscaleOptions, prefill: int, *, scales: bool) -> dict[str, Any]:
    """All phases, from `prefill` prefill workers on.

    Returns:
        `changes`: when, and what prefill workers there were from then on; `phases`: for the second
        half of each, calls a second, seconds until a prompt was covered and of a decode step.
    """
    split = Split(prefill, options.devices - prefill)
    flow, now, changes, rows = _Flow(options, split), 0.0, [], []
    policy = msgspec.structs.replace(options.policy, devices=options.devices)
    scaler: Autoscaler | None = None
    observed, arrived = 0.0, 0.0
    for phase in options.phases:
        capacity = capacity_of(flow.machine, phase, options.step_seconds)
        if scaler is None:
            scaler = Autoscaler(capacity, policy, split)
        scaler.capacity = capacity
        start, end = now, now + phase.seconds
        while now < end:
            flow.tick(now, phase)
            now += TICK
            if now - observed < options.observe_seconds:
                continue
            rate = (flow.arrived_tokens - arrived) / (now - observed)
            observed, arrived = now, flow.arrived_tokens
            seen = Observation(now, rate, flow.waiting_tokens, flow.sequences, flow.pages)
            if scales and (wanted := scaler.observe(seen)) is not None:
                side = "prefill" if wanted.prefill > flow.split.prefill else "decode"
                flow.split = wanted
                flow.coming.append((now + options.change_seconds, side))
                changes.append((now, wanted.prefill))
        half = [row for row in flow.ended if row[0] >= start + phase.seconds / 2]
        rows.append(_figures(half, phase.seconds / 2) | {"prefill": flow.split.prefill})
    return {"changes": changes, "phases": rows}


def _figures(ended: Sequence[tuple[float, float, float]], seconds: float) -> dict[str, float]:
    if not ended:
        return {"calls_per_s": 0.0, "covered_p95_s": float("inf"), "step_p95_s": float("inf")}
    covered, steps = (np.array([row[i] for row in ended]) for i in (1, 2))
    return {
        "calls_per_s": len(ended) / seconds,
        "covered_p95_s": float(np.percentile(covered, 95)),
        "step_p95_s": float(np.percentile(steps, 95)),
    }


def run(options: AutoscaleOptions) -> dict[str, Any]:
    """`{"options", "scaled", "fixed"}`: with the policy, and each division left alone."""
    plain = asdict(dataclasses.replace(options, policy=Policy()))
    plain["policy"] = msgspec.to_builtins(options.policy)
    return {
        "options": plain,
        "kv_bytes": kv_bytes(MODELS[options.model]),
        "scaled": play(options, options.prefill, scales=True),
        "fixed": {count: play(options, count, scales=False) for count in range(1, options.devices)},
    }


def lines(found: dict[str, Any]) -> Sequence[str]:
    """What is printed."""
    options, scaled = found["options"], found["scaled"]
    said = [f"starts with {options['prefill']} prefill workers of {options['devices']}"]
    said += [f"{moment:6.0f} s: {count} prefill workers" for moment, count in scaled["changes"]]
    for number, (phase, row) in enumerate(zip(options["phases"], scaled["phases"], strict=True)):
        said.append(
            f"phase {number + 1}: {phase['calls_per_s']:g} calls/s of {phase['computed']} + "
            f"{phase['generated']} tokens; in its second half, prompts covered after p95, and a "
            "decode step"
        )
        said.append(f"  scaled, {row['prefill']} prefill: {_row(row)}")
        for count, fixed in found["fixed"].items():
            said.append(f"  fixed, {count} prefill: {_row(fixed['phases'][number])}")
    return said


def _row(row: dict[str, float]) -> str:
    return (
        f"{row['calls_per_s']:.1f} calls/s, {row['covered_p95_s']:.2f} s, "
        f"{row['step_p95_s'] * 1e3:.1f} ms"
    )
