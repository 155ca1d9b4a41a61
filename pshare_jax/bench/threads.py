"""`bench threads`: what steps would take on more cores than this machine has.

A step of the engine is traced on one thread, cut as the kernels cut it for each number of threads
(`kernels/native/loop_trace.py`); who would take which iteration when is played in virtual time
(`thread_loops.py`). What runs on one thread anyway stays as it was measured: C++ between loops, XLA
between calls, and the host between steps. As far as this machine has the cores, the prediction is
compared with the real thing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pshare_jax.bench.machine import describe
from pshare_jax.bench.micro_targets import MODEL, EngineTarget
from pshare_jax.bench.roofline import MachineOptions, read_rate
from pshare_jax.bench.thread_loops import loop_seconds
from pshare_jax.bench.thread_steps import Step, parts_of, step_bytes, steps_of
from pshare_jax.config import DecodeConfig, DType, ModelEntry, PrefillConfig, ServeConfig
from pshare_jax.convert.manifest import read_manifest
from pshare_jax.engine.devices import compute_dtype, prepare_jax
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.engine.sources import checkpoint_sources
from pshare_jax.errors import BenchmarkError, ConfigError
from pshare_jax.kernels.native.library import Library, require_library
from pshare_jax.kernels.native.loop_trace import traced

_LOOPS, _PAUSES, _TRIES = 500, 100, 20
_ROOM = 640
"""Tokens that a row may generate while it is measured, and while traces are read."""

_LINE_SECONDS = 80e-9
"""Where there is one core only: about what it takes from core to core on one chip of a server."""

_LEAST_LINE_SECONDS = 20e-9
"""No server's chip is quicker: a machine whose cores are busy with something else seems to be."""


@dataclass(frozen=True)
class ThreadsOptions:
    """What is measured, and for what it is predicted.

    Args:
        base: the prefill checkpoint.
        threads: teams to predict.
        batches: rows of decode steps.
        context: prompt tokens of each row while decoding.
        chunk: tokens of the prompt that is computed in one chunk.
        steps: decode steps that are traced for each team, and prompts.
        repeats: windows of as many steps that are measured with real threads, and prompts.
        gb_per_s: what all cores together read from memory; 0 is what this machine's do.
        line_ns: nanoseconds of a line of memory from one core to another; 0 is as measured here.
        page_size: token slots of a KV page.
        dtype: as in the server's configuration.
        seed: of the random prompts.

    Raises:
        ConfigError: a number that is too small.
    """

    base: str = "checkpoints/smollm2-135m"
    threads: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    batches: list[int] = field(default_factory=lambda: [1, 8, 32])
    context: int = 128
    chunk: int = 512
    steps: int = 6
    repeats: int = 3
    gb_per_s: float = 0.0
    line_ns: float = 0.0
    page_size: int = 64
    dtype: DType = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = (*self.threads, *self.batches, self.context, self.chunk, self.repeats)
        if not self.threads or min(numbers) < 1:
            raise ConfigError("bench threads: all numbers must be 1 or more")
        if self.steps < 2 or min(self.gb_per_s, self.line_ns) < 0:
            raise ConfigError("bench threads: steps must be 2 or more, rates 0 or more")


def serve_config(options: ThreadsOptions) -> ServeConfig:
    """An engine of one model with room for the largest batch."""
    longest = max(options.chunk, options.context) + _ROOM
    rows = max(options.batches) + 1
    pages = rows * -(-longest // options.page_size) + 1
    return ServeConfig(
        base=options.base,
        models=[ModelEntry(MODEL)],
        dtype=options.dtype,
        kernel_backend="cpu_ffi",
        max_model_len=longest,
        page_size=options.page_size,
        reply_kv="off",
        prefill=PrefillConfig(num_pages=pages, chunk_buckets=[options.chunk]),
        decode=DecodeConfig(
            num_pages=pages,
            max_num_seqs=max(options.batches),
            batch_buckets=sorted(options.batches),
        ),
    )


def run(options: ThreadsOptions) -> dict[str, Any]:
    """Traces, measures and predicts.

    Returns:
        `{"options", "machine", "cores", "gb_per_s", "line_ns", "workloads": {name: {"measured":
        {threads: seconds}, "predicted": {threads: {"seconds", "loops", "cpp", "xla", "gap",
        "host", "stages": {stage: {"loops", "iterations", "work", "seconds", "memory"}}}}}}}`, all
        in seconds a step.

    Raises:
        CheckpointError: the base cannot be loaded.
        ConfigError: there is no C++ library on this machine.
        BenchmarkError: rows ended while they were measured.
    """
    config = serve_config(options)
    prepare_jax(config)
    library = require_library()
    gb_per_s = options.gb_per_s or read_rate(MachineOptions(repeats=3))
    line_seconds = options.line_ns / 1e9 or line_of(library)
    model = read_manifest(config.base).config
    base, sources = checkpoint_sources(config, compute_dtype(config, model))
    engine = Orchestrator(config, base, sources)
    engine.start()
    workloads: dict[str, Any] = {}
    try:
        bench = _Bench(options, EngineTarget(engine), library, model.vocab_size)
        measured = {f"prefill of {options.chunk} tokens": (0, *bench.prefill())}
        for batch in options.batches:
            measured[f"decode, batch {batch}"] = (batch, *bench.decode(batch))
    finally:
        library.limit_threads(library.threads)
        engine.stop()
    for name, (rows, traces, real) in measured.items():
        nbytes = step_bytes(model, rows, options.context)
        workloads[name] = {
            "measured": real,
            "predicted": {
                threads: predict(steps, threads, line_seconds, 1e9 * gb_per_s, nbytes)
                for threads, steps in traces.items()
            },
        }
    return {
        "options": asdict(options),
        "machine": describe(),
        "cores": library.threads,
        "gb_per_s": gb_per_s,
        "line_ns": 1e9 * line_seconds,
        "workloads": workloads,
    }


def line_of(library: Library) -> float:
    """Seconds of a line of memory from core to core: what two threads lose when they share out two
    iterations, each long enough that the other thread is there for it. The quickest of some tries:
    whatever else runs on the machine only makes it longer.
    """
    if library.threads < 2:
        return _LINE_SECONDS

    def seconds(threads: int, count: int) -> float:
        library.limit_threads(threads)
        found = []
        for _ in range(_TRIES):
            started = time.perf_counter()
            library.share_out(_LOOPS, count, _PAUSES)
            found.append((time.perf_counter() - started) / _LOOPS)
        return min(found)

    lost = seconds(2, 2) - seconds(1, 1)
    library.limit_threads(library.threads)
    # The model is linear in it.
    return max(_LEAST_LINE_SECONDS, lost / (loop_seconds([9.0, 9.0], 2, 1.0) - 9.0))


def predict(
    steps: Sequence[Step],
    threads: int,
    line_seconds: float,
    bytes_per_s: float,
    nbytes: dict[str, float],
) -> dict[str, Any]:
    """What a step takes a team.

    Args:
        steps: traced, cut for that team.
        threads: of the team.
        line_seconds: of a line of memory from one core to another.
        bytes_per_s: that all cores together read from memory.
        nbytes: that a loop of each stage reads.
    """
    parts = parts_of(steps)
    stages: dict[str, dict[str, float]] = {}
    for (stage, _), group in parts.loops.items():
        played = loop_seconds(group.iterations.tolist(), threads, line_seconds)
        memory = nbytes.get(stage, 0.0) / bytes_per_s if threads > 1 else 0.0
        into = stages.setdefault(
            stage, {"loops": 0.0, "iterations": 0.0, "work": 0.0, "seconds": 0.0, "memory": 0.0}
        )
        into["loops"] += group.times
        into["iterations"] += group.times * len(group.iterations)
        into["work"] += group.times * float(group.iterations.sum())
        into["seconds"] += group.times * max(played, memory)
        into["memory"] += group.times * memory
    loops = sum(stage["seconds"] for stage in stages.values())
    computed = loops + parts.cpp + parts.xla + parts.gap
    return {
        # The host plans a step while the one before it is computed, but it plans each.
        "seconds": max(computed, parts.host),
        "loops": loops,
        "cpp": parts.cpp,
        "xla": parts.xla,
        "gap": parts.gap,
        "host": parts.host,
        "stages": stages,
    }


class _Bench:
    """Runs steps of an engine, traced and with real threads."""

    def __init__(self, options: ThreadsOptions, target: EngineTarget, library: Library, vocab: int):
        self._options = options
        self._target = target
        self._library = library
        self._vocab = vocab
        self._rng = np.random.default_rng(options.seed)

    def decode(self, batch: int) -> tuple[dict[int, list[Step]], dict[int, float]]:
        """Of each team its traced steps, and of real teams the median seconds of a step."""
        options = self._options
        room = serve_config(options).max_model_len - options.context
        with self._rows(batch, room):

            def window() -> float:
                return self._seconds(options.steps * batch) / options.steps

            window()
            traces: dict[int, list[Step]] = {}
            for threads in options.threads:
                began = time.process_time()
                with traced(threads) as trace:
                    # Of which the first one has begun before, and the last may not have ended.
                    self._seconds((options.steps + 2) * batch)
                    used = time.process_time() - began
                traces[threads] = steps_of(trace.calls, used)
            return traces, self._real(window)

    def prefill(self) -> tuple[dict[int, list[Step]], dict[int, float]]:
        """As `decode`; a step is a prompt of one chunk, to its first token."""
        self._first_token()

        def traced_prompt(threads: int) -> Step:
            began, cpu = time.perf_counter(), time.process_time()
            with traced(threads) as trace:
                self._first_token()
                wall, used = time.perf_counter() - began, time.process_time() - cpu
            return Step(trace.calls, wall, used)

        traces = {
            threads: [traced_prompt(threads) for _ in range(self._options.steps // 2)]
            for threads in self._options.threads
        }
        return traces, self._real(self._first_token)

    def _real(self, window: Callable[[], float]) -> dict[int, float]:
        """Median seconds of a step, of all teams of this machine's cores in turn."""
        teams = [n for n in self._options.threads if n <= self._library.threads]
        seconds: dict[int, list[float]] = {threads: [] for threads in teams}
        for _ in range(self._options.repeats):
            for threads in teams:
                self._library.limit_threads(threads)
                seconds[threads].append(window())
        self._library.limit_threads(self._library.threads)
        return {threads: float(np.median(found)) for threads, found in seconds.items()}

    def _first_token(self) -> float:
        # The last token of a prompt is the decode module's.
        prompt = self._rng.integers(0, self._vocab, self._options.chunk + 1).tolist()
        started = time.perf_counter()
        self._target.submit(prompt, 1, MODEL)
        self._until_ended(1)
        return time.perf_counter() - started

    @contextmanager
    def _rows(self, batch: int, room: int) -> Iterator[None]:
        prompts = self._rng.integers(0, self._vocab, (batch, self._options.context)).tolist()
        ids = [self._target.submit(prompt, room, MODEL) for prompt in prompts]
        waiting = set(ids)
        while waiting:
            waiting.discard(self._target.next().request_id)
        try:
            yield
        finally:
            for request_id in ids:
                self._target.abort(request_id)
            self._until_ended(batch)

    def _seconds(self, tokens: int) -> float:
        """Until so many tokens have come, beginning with one that has just come."""
        while self._target.has_event:
            self._running()
        self._running()
        started = time.perf_counter()
        while tokens > 0:
            tokens -= self._running()
        return time.perf_counter() - started

    def _running(self) -> int:
        event = self._target.next()
        if event.finished:
            raise BenchmarkError(f"bench threads: a row ended before its {_ROOM} tokens sufficed")
        return event.tokens

    def _until_ended(self, count: int) -> None:
        while count > 0:
            count -= self._target.next().finished
