"""Engines over tiny random models, and a client that collects what they emit."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax

from pshare_jax.config import DecodeConfig, ModelEntry, PrefillConfig, ServeConfig
from pshare_jax.engine.loader import BaseSource, LoadTensors, ModelSource
from pshare_jax.engine.monolithic import Monolithic
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.engine.request import (
    FinishReason,
    PromptUsage,
    Request,
    RequestOutput,
    SamplingParams,
)
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.decoder import init_weights
from pshare_jax.models.lora import LoraModule, merge
from pshare_jax.models.split import Certificate
from pshare_jax.models.weights import Weights

MAX_LEN = 128
PAGE = 8


def serve_config(**overrides: Any) -> ServeConfig:
    """Small pages, chunks and batches, so that short prompts cross many borders."""
    defaults: dict[str, Any] = {
        "base": "base",
        "models": [ModelEntry("unused")],
        "dtype": "float32",
        "max_model_len": MAX_LEN,
        "page_size": PAGE,
        "compilation_cache_dir": "",
        "prefill": PrefillConfig(chunk_buckets=[4, 16]),
        "decode": DecodeConfig(batch_buckets=[1, 4], max_num_seqs=8, replay_buckets=[4]),
    }
    return ServeConfig(**{**defaults, **overrides})


def loader(weights: Weights) -> LoadTensors:
    """Loads arrays that are in memory."""
    return lambda shardings: {n: jax.device_put(a, shardings[n]) for n, a in weights.items()}


class Models:
    """A base with decode modules over it; `full_weights` gives each one's for the oracle."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.base = init_weights(config, seed=0)
        self.full_weights: dict[str, Weights] = {}
        self.sources: list[ModelSource] = []
        self.tails: dict[str, int] = {}

    def add_full(self, name: str, seed: int, *, tail: int = 1, isolated: bool = False) -> None:
        weights = init_weights(self.config, seed=seed)
        self._add(name, weights, weights, self._certificate(tail), "full", isolated)

    def add_identity(self, name: str, *, isolated: bool = False) -> None:
        self._add(name, self.base, self.base, None, "identity", isolated)

    def add_lora(
        self, name: str, module: LoraModule, *, tail: int = 1, isolated: bool = False
    ) -> None:
        certificate = replace(
            self._certificate(tail),
            kind="lora",
            lora_rank=module.rank,
            lora_alpha=module.alpha,
            lora_targets=tuple(module.targets),
        )
        full = merge(self.base, module)
        self._add(name, module.weights, full, certificate, "lora", isolated)

    def _add(
        self,
        name: str,
        weights: Weights,
        full: Weights,
        certificate: Certificate | None,
        kind: Any,
        isolated: bool,
    ) -> None:
        sharing = "isolated" if isolated else "shared"
        self.full_weights[name] = full
        self.tails[name] = certificate.tail if certificate else 1
        self.sources.append(ModelSource(name, kind, sharing, loader(weights), certificate))

    def _certificate(self, tail: int) -> Certificate:
        return Certificate("base-print", tail, "full", True, "own-print")

    @property
    def base_source(self) -> BaseSource:
        return BaseSource(self.config, "base-print", loader(self.base))

    def expected(
        self, oracle: Monolithic, name: str, prompt: Sequence[int], max_tokens: int
    ) -> list[int]:
        """What the oracle generates for model `name`."""
        source = next(s for s in self.sources if s.name == name)
        own = self.full_weights[name]
        prefill = own if source.sharing == "isolated" else self.base
        return oracle.generate(prefill, own, prompt, max_tokens, tail=self.tails[name])


class Reply:
    """Collects the events of one request."""

    def __init__(self) -> None:
        self._events: queue.Queue[RequestOutput] = queue.Queue()
        self.tokens: list[int] = []
        self.logprobs: list[Any] = []
        self.usage: PromptUsage | None = None
        self.reason: FinishReason | None = None
        self.error: str | None = None

    def sink(self, event: RequestOutput) -> None:
        self._events.put(event)

    def next_event(self, timeout: float = 60) -> RequestOutput:
        event = self._events.get(timeout=timeout)
        assert self.reason is None, "an event came after the last one"
        self.tokens += event.token_ids
        self.logprobs += event.logprobs
        self.usage = event.usage or self.usage
        self.reason, self.error = event.finish_reason, event.error
        return event

    def wait(self, timeout: float = 60) -> Reply:
        while self.reason is None:
            self.next_event(timeout)
        return self


class Client:
    """Submits requests to an orchestrator."""

    def __init__(self, engine: Orchestrator):
        self.engine = engine
        self._count = 0

    def submit(
        self, model: str, prompt: Sequence[int], max_tokens: int = 8, **params: Any
    ) -> Reply:
        salt = params.pop("cache_salt", "")
        params = {"temperature": 0.0, "ignore_eos": True, **params}
        self._count += 1
        reply = Reply()
        reply_id = f"r{self._count}"
        reply.id = reply_id  # type: ignore[attr-defined]
        self.engine.submit(
            Request(
                reply_id,
                model,
                tuple(prompt),
                SamplingParams(max_tokens=max_tokens, **params),
                salt,
            ),
            reply.sink,
        )
        return reply

    def generate(self, model: str, prompt: Sequence[int], max_tokens: int = 8, **p: Any) -> Reply:
        return self.submit(model, prompt, max_tokens, **p).wait()


@contextmanager
def running(models: Models, config: ServeConfig) -> Iterator[Client]:
    """A started engine; its page books are checked when everything has ended."""
    engine = Orchestrator(config, models.base_source, models.sources)
    engine.start()
    try:
        yield Client(engine)
    finally:
        engine.stop()
    for cache in engine.caches.values():
        cache.check()
