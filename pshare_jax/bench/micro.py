"""`bench micro`: prefill and decode speed of one model through the real engine, no HTTP.

Prefill: a prompt of random tokens that nothing has been cached of, from submission to the first
generated token; so handoff and one decode step are in it. Decode: all rows run, their
prompts differ, and the rate is taken over a window in which no row starts or ends.
"""

from __future__ import annotations

import queue
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pshare_jax.config import DecodeConfig, ModelEntry, PrefillConfig, ServeConfig
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.engine.request import Request, RequestOutput, SamplingParams
from pshare_jax.errors import EngineDeadError

PREFILL_LENGTHS = (512, 2048)
BATCHES = (1, 8, 32)
MODEL = "base"


@dataclass(frozen=True)
class MicroOptions:
    """What is measured.

    Args:
        base: the prefill checkpoint.
        context: prompt tokens of each row while decoding.
        window: tokens a row in one decode window.
        repeats: prefills of each length, and decode windows of each batch; medians are reported.
        page_size: token slots of a KV page.
        chunk: prefill chunk size, in tokens.
        seed: of the random prompts.
    """

    base: str = "checkpoints/smollm2-135m"
    context: int = 1024
    window: int = 16
    repeats: int = 5
    page_size: int = 64
    chunk: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Rate:
    """Tokens a second: the median, and the slowest and fastest repeat."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, rates: list[float]) -> Rate:
        """From one rate a repeat."""
        return cls(statistics.median(rates), min(rates), max(rates))


class _Bench:
    def __init__(self, options: MicroOptions, engine: Orchestrator):
        self._options = options
        self._engine = engine
        self._rng = np.random.default_rng(options.seed)
        self._count = 0

    def prompt(self, length: int) -> tuple[int, ...]:
        vocab = self._engine.model_config.vocab_size
        return tuple(self._rng.integers(0, vocab, length).tolist())

    def submit(
        self, prompt: tuple[int, ...], max_tokens: int, events: queue.SimpleQueue[RequestOutput]
    ) -> str:
        self._count += 1
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = Request(f"micro-{self._count}", MODEL, prompt, params)
        self._engine.submit(request, events.put)
        return request.id

    def prefill(self, length: int) -> float:
        events: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        prompt = self.prompt(length)
        started = time.perf_counter()
        self.submit(prompt, 1, events)
        _next(events)
        return length / (time.perf_counter() - started)

    def decode(self, batch: int) -> list[float]:
        options = self._options
        prompts = [self.prompt(options.context) for _ in range(batch)]
        events: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        for prompt in prompts:  # their KV is cached from here on
            self.submit(prompt, 1, events)
            _next(events)
        room = self._engine.config.max_model_len - options.context
        ids = [self.submit(prompt, room, events) for prompt in prompts]
        waiting = set(ids)
        while waiting:
            waiting.discard(_next(events).request_id)
        rates = []
        for _ in range(options.repeats):
            tokens, started = 0, time.perf_counter()
            while tokens < options.window * batch:
                tokens += len(_next(events).token_ids)
            rates.append(tokens / (time.perf_counter() - started))
        for request_id in ids:
            self._engine.abort(request_id)
        ended = 0
        while ended < batch:
            ended += _next(events).finish_reason is not None
        return rates


def _next(events: queue.SimpleQueue[RequestOutput]) -> RequestOutput:
    event = events.get(timeout=300)
    if event.error is not None:
        raise EngineDeadError(event.error)
    return event


def serve_config(options: MicroOptions) -> ServeConfig:
    """An engine of one model with room for the largest batch."""
    longest = max(max(PREFILL_LENGTHS), options.context) + options.page_size
    max_model_len = max(longest, options.context + options.window * (options.repeats + 4))
    pages = -(-(options.context + max_model_len) * max(BATCHES) // options.page_size) // 2 + 1
    return ServeConfig(
        base=options.base,
        models=[ModelEntry(MODEL)],
        max_model_len=max_model_len,
        page_size=options.page_size,
        prefill=PrefillConfig(num_pages=pages, chunk_buckets=[options.chunk]),
        decode=DecodeConfig(num_pages=pages, batch_buckets=list(BATCHES)),
    )


def run(options: MicroOptions) -> dict[str, Any]:
    """Measures; returns `{"options", "prefill": {length: rate}, "decode": {batch: rate}}`.

    Raises:
        CheckpointError: the base cannot be loaded.
        EngineDeadError: the engine failed.
    """
    engine = Orchestrator.from_config(serve_config(options))
    engine.start()
    try:
        bench = _Bench(options, engine)
        bench.prefill(max(PREFILL_LENGTHS))  # the first run of everything is not counted
        prefill = {
            length: asdict(Rate.of([bench.prefill(length) for _ in range(options.repeats)]))
            for length in PREFILL_LENGTHS
        }
        decode = {batch: asdict(Rate.of(bench.decode(batch))) for batch in BATCHES}
        compiles = engine.stats().compiles
    finally:
        engine.stop()
    return {
        "options": asdict(options),
        "prefill": prefill,
        "decode": decode,
        "compiles": compiles,
    }
