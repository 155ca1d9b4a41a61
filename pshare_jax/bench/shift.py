"""`bench shift`: a load that changes from decode to prefill, and meshes that change with it.

Many long replies are being generated on most meshes when long prompts begin to come. Meshes that
are given to prefill have rows; those may end first, be replayed elsewhere, or move with their KV.
In virtual time, with the engine's own cores, on accelerators' rooflines.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from pshare_jax.bench.accelerators import ACCELERATORS
from pshare_jax.bench.compile_models import MODELS
from pshare_jax.bench.plan.costs import Efficiency, kv_bytes
from pshare_jax.bench.plan.machines import Engines, Machine
from pshare_jax.bench.plan.specs import EngineSpec, ServerSpec, SystemSpec
from pshare_jax.bench.plan.system import SimCall, System
from pshare_jax.config import DecodeConfig
from pshare_jax.core.balance import BalancePolicy

Way = Literal["static", "drain", "replay", "move", "itself"]

WAYS: tuple[tuple[str, Way], ...] = (
    ("static, as before the shift", "static"),
    ("drain, then flip", "drain"),
    ("flip, rows replayed", "replay"),
    ("flip, rows move", "move"),
    ("by themselves, rows move", "itself"),
)

LOOK_SECONDS = 0.02
"""Between two looks whether a mesh is drained."""


@dataclass(frozen=True)
class ShiftOptions:
    """What is simulated.

    Args:
        accelerator: of each mesh; a name of `bench compile`'s table.
        model: a name of `bench compile`'s models.
        meshes: how many, of one device each.
        prefill: of these, that do prefill before the shift.
        flipped: decode meshes that are given to prefill at the shift.
        rows: replies that are being generated at the shift, on all decode meshes together.
        reply: tokens of each.
        context: prompt tokens of each.
        shift: seconds after which the long prompts come.
        prompts: that come then, all at once.
        long: tokens of each.
        answer: tokens that each is answered with.
        backlog: tokens that wait at each prefill mesh when meshes change by themselves.
        efficiency: what is assumed of the hardware.
    """

    accelerator: str = "h100"
    model: str = "Llama-3.1-8B"
    meshes: int = 4
    prefill: int = 1
    flipped: int = 2
    rows: int = 96
    reply: int = 1024
    context: int = 1024
    shift: float = 6.0
    prompts: int = 64
    long: int = 8192
    answer: int = 16
    backlog: int = 32_768
    efficiency: Efficiency = field(default_factory=Efficiency)


def run(options: ShiftOptions) -> dict[str, Any]:
    """Simulates every way.

    Returns:
        `{"options", "rows": [{"way", figures}]}`: seconds until the long prompts' first tokens
        (`ttft_median`, `ttft_p95`) and until the last of them has ended (`seconds`); the longest
        pause between two tokens of a reply that was under way, in the median and at worst
        (`gap_median`, `gap_worst`), seconds until the last of those has ended (`replies_seconds`),
        `flip_seconds` until the last mesh does prefill, `moved_rows` and `moved_bytes`, and
        `throughput`: generated and long prompt tokens a second until all has ended.
    """
    rows = [{"way": name} | _simulate(options, way) for name, way in WAYS]
    return {"options": asdict(options), "rows": rows}


def _system(options: ShiftOptions, way: Way) -> tuple[System, float]:
    machine = Machine(
        ACCELERATORS[options.accelerator],
        options.meshes,
        MODELS[options.model],
        options.efficiency,
        Engines(),
    )
    size = machine.engines.page_size
    need = options.rows * -(-(options.context + options.reply) // size)
    pages = need + options.prompts * -(-(options.long + options.answer) // size) + 64
    server = ServerSpec(
        models=[0],
        shared=True,
        one_group=True,
        page_size=size,
        chunk_buckets=machine.engines.chunk_buckets,
        settings=DecodeConfig(
            max_num_seqs=machine.engines.max_num_seqs,
            batch_buckets=machine.engines.batch_buckets,
            replay_buckets=machine.engines.replay_buckets,
        ),
        prefill=[],
        decode=[EngineSpec(machine.costs(1), pages, i) for i in range(options.meshes)],
        either=options.prefill,
        moves=way != "replay",
        balance=BalancePolicy(options.backlog, machine.engines.max_num_seqs)
        if way == "itself"
        else None,
    )
    return System(SystemSpec([server])), float(kv_bytes(machine.model) * size)


class _Run:
    """One way through the shift."""

    def __init__(self, options: ShiftOptions, way: Way):
        self.options = options
        self.way = way
        self.system, self.page_bytes = _system(options, way)
        self.replies: list[SimCall] = []
        self.prompts: list[SimCall] = []
        self.flipped_at = 0.0
        self._numbers = iter(range(10**9))
        last = options.meshes - options.flipped
        self._waiting = [f"server0.decode{i}" for i in range(last, options.meshes)]

    def play(self) -> None:
        """Plays it to the end."""
        options, clock = self.options, self.system.clock
        for i in range(options.rows):
            # Not at once, so that they do not end at once.
            at = 0.7 * options.shift * i / options.rows
            clock.at(at, partial(self._ask, self.replies, options.context, options.reply))
        clock.at(options.shift, self._shift)
        clock.run()

    def _ask(self, kept: list[SimCall], prompt: int, tokens: int) -> None:
        number = next(self._numbers)
        kept.append(self.system.submit(number, 0, prompt, tokens, lambda: None))

    def _shift(self) -> None:
        options, system = self.options, self.system
        if self.way in ("replay", "move"):
            for worker in self._waiting:
                system.give_mesh(worker.replace("decode", "prefill"))
            self.flipped_at = system.clock.now
        elif self.way == "drain":
            for worker in self._waiting:
                system.rest(worker)
            self._flip_drained()
        for _ in range(options.prompts):
            self._ask(self.prompts, options.long, options.answer)

    def _flip_drained(self) -> None:
        system = self.system
        held = {worker.name: worker.core.held_ids() for worker in system.decode}
        for worker in [name for name in self._waiting if not held[name]]:
            self._waiting.remove(worker)
            system.give_mesh(worker.replace("decode", "prefill"))
            self.flipped_at = system.clock.now
        if self._waiting:
            system.clock.at(system.clock.now + LOOK_SECONDS, self._flip_drained)


def _simulate(options: ShiftOptions, way: Way) -> dict[str, Any]:
    played = _Run(options, way)
    played.play()
    start, stats = options.shift, [worker.core.stats for worker in played.system.decode]
    first = [call.arrivals[0] - start for call in played.prompts]
    ends = [call.arrivals[-1] - start for call in played.prompts]
    under_way = [c for c in played.replies if c.arrivals[0] < start < c.arrivals[-1]]
    gaps = [_longest_gap(call, start) for call in under_way]
    last = max(call.arrivals[-1] for call in (*played.prompts, *played.replies)) - start
    later = sum(time > start for c in (*played.replies, *played.prompts) for time in c.arrivals)
    return {
        "ttft_median": float(np.median(first)),
        "ttft_p95": float(np.percentile(first, 95)),
        "seconds": max(ends),
        "under_way": len(under_way),
        "gap_median": float(np.median(gaps)),
        "gap_worst": max(gaps),
        "replies_seconds": max(call.arrivals[-1] for call in played.replies) - start,
        "flip_seconds": max(played.flipped_at - start, 0.0),
        "moved_rows": sum(s.moved_rows for s in stats),
        "moved_bytes": sum(s.moved_pages for s in stats) * played.page_bytes,
        "throughput": (later + options.prompts * options.long) / last,
    }


def _longest_gap(call: SimCall, start: float) -> float:
    """The longest pause between tokens of which the later one came after the shift."""
    times = np.asarray(call.arrivals)
    gaps = np.diff(times)[times[1:] > start]
    return float(gaps.max()) if gaps.size else 0.0


def lines(result: dict[str, Any]) -> list[str]:
    """A Markdown table of a result."""
    options = result["options"]
    shown = [
        f"{options['meshes']} x {options['accelerator']}, {options['model']}: "
        f"{options['prefill']} prefill, {options['meshes'] - options['prefill']} decode, of which "
        f"{options['flipped']} are given to prefill. Virtual time.",
        "",
        "| | TTFT of the long prompts, s (p95) | all of them, s | flipped after, s "
        "| longest pause of a reply, ms: median, worst | replies end, s | rows moved, MB "
        "| tokens/s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    return shown + [
        f"| {row['way']} | {row['ttft_median']:.2f} ({row['ttft_p95']:.2f}) "
        f"| {row['seconds']:.2f} | {row['flip_seconds']:.2f} "
        f"| {1e3 * row['gap_median']:.0f}, {1e3 * row['gap_worst']:.0f} "
        f"| {row['replies_seconds']:.2f} "
        f"| {row['moved_rows']}, {row['moved_bytes'] / 1e6:.0f} "
        f"| {row['throughput']:,.0f} |"
        for row in result["rows"]
    ]
