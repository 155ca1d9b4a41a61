"""Engines that are asked one prompt at a time, for benchmarks of the KV store."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pshare_jax.bench.micro_targets import MODEL
from pshare_jax.config import (
    DecodeConfig,
    DType,
    KvStoreConfig,
    ModelEntry,
    PrefillConfig,
    ServeConfig,
)
from pshare_jax.core.requests import Request, RequestOutput, SamplingParams
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.errors import BenchmarkError

SETTLE_SECONDS = 60.0
ANSWER_SECONDS = 120.0
_GENERATED = 8


@dataclass(frozen=True)
class FirstToken:
    """Seconds from submission to the first token, processor seconds of this process meanwhile,
    prompt tokens that were computed, and what was answered."""

    seconds: float
    cpu_seconds: float
    computed: int
    tokens: tuple[int, ...]


@contextmanager
def engine_of(
    base: str, dtype: DType, tokens: int, prompts: int, page_size: int, store: KvStoreConfig
) -> Iterator[Orchestrator]:
    """An engine for prompts of at most `tokens`, so many of which its pools hold.

    Raises:
        CheckpointError: the base cannot be loaded.
        ConfigError: the store cannot be made.
    """
    longest = tokens + 2 * _GENERATED
    pages = (prompts + 1) * -(-longest // page_size) + 1
    config = ServeConfig(
        base=base,
        models=[ModelEntry(MODEL)],
        dtype=dtype,
        max_model_len=longest,
        page_size=page_size,
        prefill=PrefillConfig(num_pages=pages),
        decode=DecodeConfig(num_pages=pages, max_num_seqs=1, batch_buckets=[1]),
        kv_store=store,
    )
    engine = Orchestrator.from_config(config)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def first_token(
    engine: Orchestrator, id: str, prompt: tuple[int, ...], salt: str = ""
) -> FirstToken:
    """Asks one prompt, of which nobody but those with the same salt knows anything.

    Raises:
        BenchmarkError: the engine does not answer.
    """
    events: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    params = SamplingParams(max_tokens=_GENERATED, temperature=0.0, ignore_eos=True)
    started, used = time.perf_counter(), time.process_time()
    engine.submit(Request(id, MODEL, prompt, params, salt), events.put)
    first, cpu, usage, tokens = 0.0, 0.0, None, ()
    while True:
        try:
            event = events.get(timeout=ANSWER_SECONDS)
        except queue.Empty:
            raise BenchmarkError(f"{id}: no token for {ANSWER_SECONDS:g} s") from None
        if not first:
            first, cpu = time.perf_counter() - started, time.process_time() - used
        usage, tokens = event.usage or usage, (*tokens, *event.token_ids)
        if event.finish_reason is not None:
            break
    if event.error or usage is None:
        raise BenchmarkError(f"{id}: {event.error or 'it was not answered'}")
    return FirstToken(first, cpu, usage.computed_tokens, tokens)


def settle(engine: Orchestrator) -> None:
    """Waits until what was computed has been written to the store."""
    end = time.monotonic() + SETTLE_SECONDS
    for worker in engine.workers.prefill:
        store = worker.core.store
        while store is not None and not store.behind.idle and time.monotonic() < end:
            time.sleep(0.01)
