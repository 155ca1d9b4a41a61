"""`bench turns`: appended turns of many sessions, computed together or one prompt a call.

Agents append little to a long context. Each of some sessions has a context that is cached; all of
them append a turn at once, and the rate is that of the appended tokens, from the submission to the
last first token (handoff and one decode step are in it). Two engines in one process, in turn: one
whose only chunk bucket is the largest, so that every call holds one prompt, and one with a bucket
for short prompts too, several of which share a call.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pshare_jax.bench.machine import describe
from pshare_jax.bench.micro_rates import Rate
from pshare_jax.bench.micro_targets import MODEL, EngineTarget
from pshare_jax.config import DecodeConfig, DType, ModelEntry, PrefillConfig, ServeConfig
from pshare_jax.convert.manifest import read_manifest
from pshare_jax.engine.devices import compute_dtype, prepare_jax
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.engine.sources import checkpoint_sources
from pshare_jax.errors import ConfigError

ALONE, TOGETHER = "one prompt a call", "several prompts a call"


@dataclass(frozen=True)
class TurnsOptions:
    """What is measured.

    Args:
        base: the prefill checkpoint.
        sessions: that append a turn at once.
        context: tokens of each that are cached.
        appended: tokens of each turn.
        long_prompt: tokens of a prompt that is computed alone, by both engines.
        short_bucket: chunk bucket of the engine that computes prompts together.
        chunk: the largest chunk bucket of both.
        repeats: turns of each session, and long prompts.
        page_size: token slots of a KV page.
        dtype: as in the server's configuration.
        seed: of the random prompts.

    Raises:
        ConfigError: the appended turn does not fit into the short bucket.
    """

    base: str = "checkpoints/smollm2-135m"
    sessions: int = 16
    context: int = 512
    appended: int = 72
    long_prompt: int = 2000
    short_bucket: int = 128
    chunk: int = 512
    repeats: int = 5
    page_size: int = 64
    dtype: DType = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.appended <= self.short_bucket <= self.chunk:
            raise ConfigError(
                f"appended is {self.appended}: it must be positive and at most short_bucket "
                f"({self.short_bucket}), which is at most chunk ({self.chunk})"
            )


def serve_config(options: TurnsOptions, chunk_buckets: list[int]) -> ServeConfig:
    """An engine of one model with room for all sessions."""
    longest = options.context + (options.repeats + 1) * options.appended + 2
    longest = max(longest, options.long_prompt + 1)
    pages = (options.sessions + 2) * -(-longest // options.page_size) + 1
    return ServeConfig(
        base=options.base,
        models=[ModelEntry(MODEL)],
        dtype=options.dtype,
        max_model_len=longest,
        page_size=options.page_size,
        reply_kv="off",
        prefill=PrefillConfig(num_pages=pages, chunk_buckets=chunk_buckets),
        decode=DecodeConfig(
            num_pages=pages, max_num_seqs=options.sessions, batch_buckets=[options.sessions]
        ),
    )


def run(options: TurnsOptions) -> dict[str, Any]:
    """Measures both engines in turn.

    Returns:
        `{"options", "machine", "turns": {engine: rate}, "long": {engine: rate}, "ratio",
        "long_ratio"}`: tokens a second, and ratios of together to alone, one a repeat.

    Raises:
        CheckpointError: the base cannot be loaded.
    """
    buckets = {ALONE: [options.chunk], TOGETHER: [options.short_bucket, options.chunk]}
    configs = {name: serve_config(options, sizes) for name, sizes in buckets.items()}
    for config in configs.values():
        prepare_jax(config)
    dtype = compute_dtype(configs[ALONE], read_manifest(configs[ALONE].base).config)
    base, sources = checkpoint_sources(configs[ALONE], dtype)
    vocab = base.config.vocab_size
    with ExitStack() as stack:
        targets: dict[str, EngineTarget] = {}
        for name, config in configs.items():
            engine = Orchestrator(config, base, sources)
            engine.start()
            stack.callback(engine.stop)
            targets[name] = EngineTarget(engine)
        rng = np.random.default_rng(options.seed)
        contexts = [
            rng.integers(0, vocab, options.context).tolist() for _ in range(options.sessions)
        ]
        turns: dict[str, list[float]] = {name: [] for name in targets}
        long: dict[str, list[float]] = {name: [] for name in targets}
        for target in targets.values():
            for context in contexts:
                _rate(target, [context], 1)
        # The first round is not counted.
        for repeat in range(options.repeats + 1):
            for context in contexts:
                context += rng.integers(0, vocab, options.appended).tolist()
            prompt = rng.integers(0, vocab, options.long_prompt).tolist()
            for name, target in targets.items():
                rate = _rate(target, contexts, options.sessions * options.appended)
                long_rate = _rate(target, [prompt], options.long_prompt)
                if repeat:
                    turns[name].append(rate)
                    long[name].append(long_rate)
    return {
        "options": asdict(options),
        "machine": describe(),
        "turns": {name: asdict(Rate.of(rates)) for name, rates in turns.items()},
        "long": {name: asdict(Rate.of(rates)) for name, rates in long.items()},
        "ratio": asdict(Rate.of(_ratios(turns))),
        "long_ratio": asdict(Rate.of(_ratios(long))),
    }


def _ratios(rates: dict[str, list[float]]) -> list[float]:
    pairs = zip(rates[TOGETHER], rates[ALONE], strict=True)
    return [together / alone for together, alone in pairs]


def _rate(target: EngineTarget, prompts: list[list[int]], tokens: int) -> float:
    """Tokens a second of prompts that are submitted at once, until all have a first token."""
    started = time.perf_counter()
    for prompt in prompts:
        target.submit(prompt, 1, MODEL)
    ended = 0
    while ended < len(prompts):
        ended += target.next().finished
    return tokens / (time.perf_counter() - started)


def lines(result: dict[str, Any]) -> list[str]:
    """A Markdown table of a result."""
    options = result["options"]
    rows = [
        "| | " + " | ".join((ALONE, TOGETHER, "ratio")) + " |",
        "|---|--:|--:|--:|",
    ]
    what = f"{options['sessions']} sessions append {options['appended']} tokens at once, tokens/s"
    long = f"a prompt of {options['long_prompt']} tokens alone, tokens/s"
    for name, rates, ratio in (
        (what, result["turns"], result["ratio"]),
        (long, result["long"], result["long_ratio"]),
    ):
        cells = [f"{rates[e]['median']:,.0f}" for e in (ALONE, TOGETHER)]
        spread = f"{ratio['median']:.2f} ({ratio['low']:.2f} - {ratio['high']:.2f})"
        rows.append(f"| {name} | {' | '.join(cells)} | {spread} |")
    return rows
