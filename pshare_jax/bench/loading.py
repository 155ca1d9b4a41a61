"""`bench loading`: what streams that run notice of decode modules being loaded and unloaded.

Some streams generate all the while; modules are loaded and unloaded in turn, with pauses of the
same length between. Gaps between a stream's tokens are told apart by whether a module was being
loaded at their end.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from pshare_jax.bench.machine import describe
from pshare_jax.config_files import load_serve_config
from pshare_jax.core.requests import Request, RequestOutput, SamplingParams
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.errors import ConfigError

IDLE, LOADING = "idle", "loading"


@dataclass(frozen=True)
class LoadingOptions:
    """What is measured.

    Args:
        config: a serving configuration; its first model's streams run.
        modules: folders of decode modules, which are loaded in turn.
        streams: that run all the while.
        context: tokens of each stream's prompt.
        repeats: times that each module is loaded.
        max_loras: room for LoRA modules.
        max_lora_rank: their greatest rank.
        max_full: room for full modules.
        seed: of the random prompts.

    Raises:
        ConfigError: nothing to load.
    """

    config: str = "configs/serve/smollm2-135m.yaml"
    modules: list[str] = field(
        default_factory=lambda: ["checkpoints/smollm2-135m-tools", "checkpoints/smollm2-135m-full"]
    )
    streams: int = 4
    context: int = 256
    repeats: int = 3
    max_loras: int = 8
    max_lora_rank: int = 16
    max_full: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.modules or min(self.streams, self.repeats) < 1:
            raise ConfigError("modules, streams and repeats: at least one of each")


class Streams:
    """Streams that are begun anew whenever they end; the times of their tokens are kept."""

    def __init__(self, engine: Orchestrator, prompts: list[list[int]], clock: Callable[[], float]):
        self._engine = engine
        self._prompts = prompts
        self._clock = clock
        self._model = next(iter(engine.models))
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._stopping = False
        self._last: dict[int, float] = {}
        self.gaps: list[tuple[float, float]] = []
        """When a gap ended, and how long it was, in seconds."""

    def start(self) -> None:
        """Begins all of them."""
        for number in range(len(self._prompts)):
            self._submit(number)

    def stop(self) -> None:
        """Lets those that run end, and begins no more."""
        self._stopping = True

    def _submit(self, number: int) -> None:
        prompt = tuple(self._prompts[number])
        room = self._engine.config.max_model_len - len(prompt)
        params = SamplingParams(max_tokens=room, temperature=0.0, ignore_eos=True)
        request = Request(f"stream-{next(self._ids)}", self._model, prompt, params)
        self._last.pop(number, None)
        self._engine.submit(request, lambda output: self._heard(number, output))

    def _heard(self, number: int, output: RequestOutput) -> None:
        now = self._clock()
        if output.token_ids:
            with self._lock:
                if number in self._last:
                    self.gaps.append((now, now - self._last[number]))
            self._last[number] = now
        if output.finish_reason is not None and not self._stopping:
            self._submit(number)


def run(options: LoadingOptions) -> dict[str, Any]:
    """Measures.

    Returns:
        `{"options", "machine", "gaps": {phase: milliseconds}, "gaps_by_module": {folder:
        milliseconds}, "load_seconds", "compiles"}`: gaps have `count`, `median`, `p99` and `max`;
        `load_seconds` are by folder.

    Raises:
        ConfigError, CheckpointError: a configuration or module that cannot be used.
    """
    config = load_serve_config(options.config)
    room = replace(
        config.decode,
        max_loras=options.max_loras,
        max_lora_rank=options.max_lora_rank,
        max_full=options.max_full,
    )
    engine = Orchestrator.from_config(replace(config, decode=room))
    engine.start()
    rng = np.random.default_rng(options.seed)
    size = options.streams, options.context
    prompts = rng.integers(0, engine.model_config.vocab_size, size).tolist()
    streams = Streams(engine, prompts, time.monotonic)
    loads: dict[str, list[tuple[float, float]]] = {folder: [] for folder in options.modules}
    try:
        streams.start()
        time.sleep(2)
        begun = time.monotonic()
        for folder in [f for _ in range(options.repeats) for f in options.modules]:
            started = time.monotonic()
            engine.load_module("loaded", folder, replace=True)
            ended = time.monotonic()
            loads[folder].append((started, ended))
            time.sleep(ended - started)
        streams.stop()
        compiles = engine.stats().compiles
    finally:
        engine.stop()
    gaps = [gap for gap in streams.gaps if gap[0] > begun]
    return {
        "options": asdict(options),
        "machine": describe(),
        "gaps": summary(gaps, list(itertools.chain(*loads.values()))),
        "gaps_by_module": {f: summary(gaps, spans)[LOADING] for f, spans in loads.items()},
        "load_seconds": {f: [end - start for start, end in spans] for f, spans in loads.items()},
        "compiles": compiles,
    }


def summary(
    gaps: list[tuple[float, float]], loads: list[tuple[float, float]]
) -> dict[str, dict[str, float]]:
    """Gaps in milliseconds, by whether a module was being loaded when they ended.

    Args:
        gaps: when each ended, and its length, in seconds.
        loads: from when to when modules were loaded.
    """
    phases: dict[str, list[float]] = {IDLE: [], LOADING: []}
    for end, length in gaps:
        during = any(start <= end <= stop + length for start, stop in loads)
        phases[LOADING if during else IDLE].append(1000 * length)
    return {
        phase: {
            "count": len(values),
            "median": float(np.median(values)) if values else 0.0,
            "p99": float(np.percentile(values, 99)) if values else 0.0,
            "max": max(values, default=0.0),
        }
        for phase, values in phases.items()
    }


def lines(result: dict[str, Any]) -> list[str]:
    """A Markdown table of a result."""
    rows = [
        "| between two tokens of a stream | median ms | p99 ms | longest ms |",
        "|---|--:|--:|--:|",
    ]
    measured = [(phase, result["gaps"][phase]) for phase in (IDLE, LOADING)]
    for phase, gaps in [*measured, *result["gaps_by_module"].items()]:
        rows.append(f"| {phase} | {gaps['median']:.0f} | {gaps['p99']:.0f} | {gaps['max']:.0f} |")
    for folder, seconds in result["load_seconds"].items():
        rows.append(f"\n{folder}: loaded in {np.median(seconds):.1f} s")
    rows.append(f"\nCompilations: {result['compiles']}")
    return rows
