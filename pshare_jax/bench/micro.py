"""`bench micro`: prefill and decode speed of one model through the real engine, no HTTP.

Prefill: a prompt of random tokens that nothing has been cached of, from submission to the first
generated token; so handoff and one decode step are in it. Decode: all rows run, their
prompts differ, and the rate is taken over a window in which no row starts or ends. LoRA: as decode,
eight rows of one random module, or two rows each of four, in turn.
"""

from __future__ import annotations

import queue
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pshare_jax.config import DecodeConfig, DType, ModelEntry, PrefillConfig, ServeConfig
from pshare_jax.engine.loader import BaseSource, ModelSource, checkpoint_sources
from pshare_jax.engine.orchestrator import Orchestrator, compute_dtype, prepare_jax
from pshare_jax.engine.request import Request, RequestOutput, SamplingParams
from pshare_jax.errors import EngineDeadError
from pshare_jax.kernels.backends import backend_for
from pshare_jax.models.split import Certificate
from pshare_jax.models.weights import LORA_TARGETS, Weights, lora_specs

PREFILL_LENGTHS = (512, 2048)
BATCHES = (1, 8, 32)
MODEL = "base"
LORA_MODULES, LORA_ROWS = 4, 8


@dataclass(frozen=True)
class MicroOptions:
    """What is measured.

    Args:
        base: the prefill checkpoint.
        contexts: prompt tokens of each row while decoding, one measurement each.
        lora_rank: rank of four random LoRA modules on all projections that are measured too, at
            the first of `contexts`; 0 leaves them out.
        window: tokens a row in one decode window.
        repeats: prefills of each length, and decode windows of each batch; medians are reported.
        page_size: token slots of a KV page.
        chunk: prefill chunk size, in tokens.
        dtype: as in the server's configuration.
        kernel_backend: as in the server's configuration.
        seed: of the random prompts.
    """

    base: str = "checkpoints/smollm2-135m"
    contexts: list[int] = field(default_factory=lambda: [1024])
    lora_rank: int = 0
    window: int = 16
    repeats: int = 5
    page_size: int = 64
    chunk: int = 512
    dtype: DType = "auto"
    kernel_backend: str = "auto"
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
        self,
        prompt: tuple[int, ...],
        max_tokens: int,
        events: queue.SimpleQueue[RequestOutput],
        model: str = MODEL,
    ) -> str:
        self._count += 1
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = Request(f"micro-{self._count}", model, prompt, params)
        self._engine.submit(request, events.put)
        return request.id

    def prefill(self, length: int) -> float:
        events: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        prompt = self.prompt(length)
        started = time.perf_counter()
        self.submit(prompt, 1, events)
        _next(events)
        return length / (time.perf_counter() - started)

    def decode(self, context: int, models: Sequence[str]) -> list[float]:
        """One rate a repeat, of one row for each of `models`."""
        options, batch = self._options, len(models)
        prompts = [self.prompt(context) for _ in models]
        events: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        for prompt in prompts:  # their KV is cached from here on
            self.submit(prompt, 1, events)
            _next(events)
        room = self._engine.config.max_model_len - context
        ids = [
            self.submit(prompt, room, events, model)
            for prompt, model in zip(prompts, models, strict=True)
        ]
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

    def lora(self) -> dict[str, list[float]]:
        """Rates of rows of one LoRA module and of several, measured in turn."""
        context = self._options.contexts[0]
        one = [_lora_name(0)] * LORA_ROWS
        several = [_lora_name(i % LORA_MODULES) for i in range(LORA_ROWS)]
        rates: dict[str, list[float]] = {"one module": [], "several modules": []}
        for _ in range(2):
            rates["one module"] += self.decode(context, one)
            rates["several modules"] += self.decode(context, several)
        return rates


def _next(events: queue.SimpleQueue[RequestOutput]) -> RequestOutput:
    event = events.get(timeout=300)
    if event.error is not None:
        raise EngineDeadError(event.error)
    return event


def serve_config(options: MicroOptions) -> ServeConfig:
    """An engine of one model with room for the largest batch."""
    context = max(options.contexts)
    longest = max(max(PREFILL_LENGTHS), context) + options.page_size
    max_model_len = max(longest, context + options.window * (options.repeats + 4))
    pages = -(-(context + max_model_len) * max(BATCHES) // options.page_size) // 2 + 1
    return ServeConfig(
        base=options.base,
        models=[ModelEntry(MODEL)],
        dtype=options.dtype,
        kernel_backend=options.kernel_backend,
        max_model_len=max_model_len,
        page_size=options.page_size,
        prefill=PrefillConfig(num_pages=pages, chunk_buckets=[options.chunk]),
        decode=DecodeConfig(num_pages=pages, batch_buckets=list(BATCHES)),
    )


def run(options: MicroOptions) -> dict[str, Any]:
    """Measures.

    Returns:
        `{"options", "backend", "dtype", "prefill": {length: rate},
        "decode": {context: {batch: rate}}, "lora": {rows: rate}, "compiles"}`.

    Raises:
        CheckpointError: the base cannot be loaded.
        EngineDeadError: the engine failed.
    """
    config = serve_config(options)
    prepare_jax(config)
    dtype = compute_dtype(config)
    base, sources = checkpoint_sources(config, dtype)
    if options.lora_rank:
        sources += [_random_lora(base, i, options.lora_rank, dtype) for i in range(LORA_MODULES)]
    engine = Orchestrator(config, base, sources)
    engine.start()
    try:
        bench = _Bench(options, engine)
        bench.prefill(max(PREFILL_LENGTHS))  # the first run of everything is not counted
        prefill = {
            length: asdict(Rate.of([bench.prefill(length) for _ in range(options.repeats)]))
            for length in PREFILL_LENGTHS
        }
        decode = {
            context: {
                batch: asdict(Rate.of(bench.decode(context, [MODEL] * batch))) for batch in BATCHES
            }
            for context in options.contexts
        }
        rates = bench.lora() if options.lora_rank else {}
        compiles = engine.stats().compiles
    finally:
        engine.stop()
    return {
        "options": asdict(options),
        "backend": backend_for(config.kernel_backend, jax.default_backend()),
        "dtype": dtype.name,
        "prefill": prefill,
        "decode": decode,
        "lora": {rows: asdict(Rate.of(found)) for rows, found in rates.items()},
        "compiles": compiles,
    }


def _lora_name(i: int) -> str:
    return f"lora{i}"


def _random_lora(base: BaseSource, i: int, rank: int, dtype: jnp.dtype) -> ModelSource:
    """A LoRA module on all projections, made up when it is loaded."""

    def load(shardings: Mapping[str, Any]) -> Weights:
        rng = np.random.default_rng(i)
        specs = lora_specs(base.config, rank, LORA_TARGETS)
        arrays = {
            name: jnp.asarray(0.01 * rng.standard_normal(spec.shape), dtype)
            for name, spec in specs.items()
        }
        return jax.device_put(arrays, shardings)

    certificate = Certificate(
        base.fingerprint, 1, "lora", True, f"random-{i}", rank, float(rank), LORA_TARGETS
    )
    return ModelSource(_lora_name(i), "lora", "shared", load, certificate)
