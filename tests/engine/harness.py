"""Engines over tiny random models, and a client that collects what they emit."""

from __future__ import annotations

import functools
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from pshare_jax.config import DecodeConfig, ModelEntry, PrefillConfig, ServeConfig
from pshare_jax.core.messages import Abort
from pshare_jax.core.requests import (
    FinishReason,
    Owner,
    PromptUsage,
    Request,
    RequestOutput,
    SamplingParams,
    Session,
)
from pshare_jax.core.split_rule import LAST_TOKEN, LastTokens, SplitRule
from pshare_jax.engine.monolithic import Monolithic
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.engine.sources import BaseSource, ModelSource
from pshare_jax.engine.weight_format import LoadTensors
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.decoder import init_weights
from pshare_jax.models.lora import LoraModule, merge
from pshare_jax.models.split import Certificate
from pshare_jax.models.weights import LORA_TARGETS, Weights, lora_specs
from pshare_jax.text.tokenizer import Tokenizer
from tests.helpers import on_device, tiny_config

MAX_LEN = 128
PAGE = 8


def serve_config(**overrides: Any) -> ServeConfig:
    """Small pages, chunks, batches and pools, so that short prompts meet every border.

    Without overrides it is the one configuration that most tests use, since each other one has to
    be compiled.
    """
    defaults: dict[str, Any] = {
        "base": "base",
        "models": [ModelEntry("unused")],
        "dtype": "float32",
        "max_model_len": MAX_LEN,
        "page_size": PAGE,
        "compilation_cache_dir": "",
        # What a prompt finds in the cache must not depend on when it came.
        "reply_kv": "off",
        "prefill": PrefillConfig(chunk_buckets=[4, 16], num_pages=40),
        "decode": DecodeConfig(
            batch_buckets=[1, 4],
            max_num_seqs=8,
            replay_buckets=[4],
            num_pages=28,
            steps_per_dispatch=4,
        ),
    }
    return ServeConfig(**{**defaults, **overrides})


def loader(weights: Weights) -> LoadTensors:
    """Loads arrays that are in memory."""
    return lambda shardings: {n: jax.device_put(a, shardings[n]) for n, a in weights.items()}


class Models:
    """A base with decode modules over it; `full_weights` gives each one's for the oracle. Processes
    of a cluster have its `tokenizer`, if any."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None = None):
        self.config = config
        self.tokenizer = tokenizer
        self.base = init_weights(config, seed=0)
        self.full_weights: dict[str, Weights] = {}
        self.sources: list[ModelSource] = []
        self.rules: dict[str, SplitRule] = {}
        self.tails: dict[str, int] = {}
        self._expected: dict[tuple[str, tuple[int, ...], int], list[int]] = {}

    def add_full(
        self, name: str, seed: int, *, tail: int | SplitRule = 1, isolated: bool = False
    ) -> None:
        weights = init_weights(self.config, seed=seed)
        self._add(name, weights, weights, self._certificate(name, tail), "full", isolated)

    def add_identity(self, name: str, *, isolated: bool = False) -> None:
        self._add(name, self.base, self.base, None, "identity", isolated)

    def add_lora(
        self, name: str, module: LoraModule, *, tail: int | SplitRule = 1, isolated: bool = False
    ) -> None:
        certificate = replace(
            self._certificate(name, 1),
            kind="lora",
            tail=tail,
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
        rule = certificate.tail if certificate else LAST_TOKEN
        self.rules[name] = rule
        if isinstance(rule, LastTokens):
            self.tails[name] = rule.count
        self.sources.append(ModelSource(name, kind, sharing, loader(weights), certificate))

    def _certificate(self, name: str, tail: int | SplitRule) -> Certificate:
        return Certificate("base-print", tail, "full", True, f"print of {name}")

    @property
    def base_source(self) -> BaseSource:
        return BaseSource(self.config, "base-print", loader(self.base))

    @functools.cached_property
    def oracle(self) -> Monolithic:
        return Monolithic(self.config, MAX_LEN)

    def expected(self, name: str, prompt: Sequence[int], max_tokens: int = 8) -> list[int]:
        """What the oracle generates for model `name`; it is asked once."""
        key = name, tuple(prompt), max_tokens
        if key not in self._expected:
            weights, rule = self._weights_of(name), self.rules[name]
            self._expected[key] = self.oracle.generate(*weights, prompt, max_tokens, tail=rule)
        return list(self._expected[key])

    def expected_scores(self, name: str, prompt: Sequence[int]) -> np.ndarray:
        """The oracle's log-probabilities at every position of a prompt, `[T, V]`."""
        weights = self._weights_of(name)
        return self.oracle.prompt_logprobs(*weights, prompt, tail=self.rules[name])

    def _weights_of(self, name: str) -> tuple[Weights, Weights]:
        source = next(s for s in self.sources if s.name == name)
        own = self.full_weights[name]
        return own if source.sharing == "isolated" else self.base, own


@functools.cache
def every_kind(architecture: str = "llama") -> Models:
    """One model of every kind, with tails 1, 2 and 5 and LoRA modules of unlike shape."""
    config = tiny_config(architecture=architecture)
    models = Models(config)
    models.add_identity("identity")
    models.add_full("full", 1)
    models.add_full("full-tail2", 2, tail=2)
    models.add_lora("lora", lora_module(config, 3, rank=2, targets=("q", "v")))
    models.add_lora("lora-tail5", lora_module(config, 4, rank=4, targets=LORA_TARGETS), tail=5)
    models.add_full("isolated", 5, isolated=True)
    models.add_lora(
        "isolated-lora",
        lora_module(config, 6, rank=3, targets=("k", "up", "down")),
        tail=2,
        isolated=True,
    )
    return models


def lora_module(config: ModelConfig, seed: int, *, rank: int, targets: Sequence[str]) -> LoraModule:
    """A random module whose update is as large as the base's weights."""
    rng = np.random.default_rng(seed)
    weights = {
        name: on_device(rng.normal(0, 0.3, spec.shape))
        for name, spec in lora_specs(config, rank, targets).items()
    }
    return LoraModule(weights, 2.0 * rank, rank, targets)


class Reply:
    """Collects the events of one request."""

    def __init__(self, request_id: str) -> None:
        self.id = request_id
        self._events: queue.Queue[RequestOutput] = queue.Queue()
        self.tokens: list[int] = []
        self.logprobs: list[Any] = []
        self.prompt_logprobs: tuple[Any, ...] | None = None
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
        if event.prompt_logprobs is not None:
            assert self.prompt_logprobs is None, "prompt scores came twice"
            assert not self.tokens, "prompt scores came after a token"
            self.prompt_logprobs = event.prompt_logprobs
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
        self,
        model: str,
        prompt: Sequence[int],
        max_tokens: int = 8,
        *,
        then: Callable[[RequestOutput], None] = lambda event: None,
        **params: Any,
    ) -> Reply:
        """Greedy without end tokens unless asked otherwise; `then` is called after each event."""
        salt, owner = params.pop("cache_salt", ""), params.pop("owner", Owner())
        session = params.pop("session", Session())
        params = {"temperature": 0.0, "ignore_eos": True, **params}
        self._count += 1
        reply = Reply(params.pop("id", f"r{self._count}"))
        sampling = SamplingParams(max_tokens=max_tokens, **params)

        def sink(event: RequestOutput) -> None:
            reply.sink(event)
            then(event)

        self.engine.submit(
            Request(reply.id, model, tuple(prompt), sampling, salt, owner=owner, session=session),
            sink,
        )
        return reply

    def abort(self, reply: Reply) -> None:
        self.engine.abort(reply.id)

    def computed(self) -> int:
        """Prompt tokens computed so far, for all models."""
        tokens = self.engine.stats().prefill_tokens
        return sum(n for (_, source), n in tokens.items() if source == "computed")

    def check_idle(self) -> None:
        """No sequence holds a page, and no request is alive."""
        stats = self.engine.stats()
        assert sum(stats.running.values()) + sum(stats.waiting.values()) == 0, stats
        for cache in self.engine.caches.values():
            cache.check(idle=True)

    def generate(self, model: str, prompt: Sequence[int], max_tokens: int = 8, **p: Any) -> Reply:
        return self.submit(model, prompt, max_tokens, **p).wait()


def two_by_two() -> ServeConfig:
    """Two prefill engines, two decode engines, one token a dispatch."""
    return serve_config(
        prefill=PrefillConfig(engines=2, chunk_buckets=[16], num_pages=40),
        decode=DecodeConfig(
            engines=2, batch_buckets=[4], max_num_seqs=8, replay_buckets=[4], num_pages=28
        ),
    )


def wait_until(condition: Callable[[], Any], timeout: float = 60) -> None:
    """Polls until `condition` is true."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


@contextmanager
def held(client: Client, rows: int = 1, number: int = 0, after: int = 0) -> Iterator[None]:
    """A decode worker's thread stands still once so many sequences run there, `after` steps."""
    worker = client.engine.workers.decode[number]
    executor = worker.executor
    gate, plain, steps = threading.Event(), executor.finish, itertools.count()

    def finish() -> Any:
        if sum(worker.core.running().values()) >= rows and next(steps) >= after:
            gate.wait(60)
        return plain()

    executor.finish = finish  # type: ignore[method-assign]
    try:
        yield
    finally:
        executor.finish = plain  # type: ignore[method-assign]
        gate.set()


def passed_on(client: Client) -> None:
    """Waits until workers have been sent what was asked of the engine so far."""
    # What it has to say is carried after each thing that it does.
    for _ in range(2):
        done = threading.Event()
        client.engine._control.post(done.set)
        assert done.wait(60)


def in_thread_of(client: Client, worker: str, function: Callable[[], Any]) -> Any:
    """Runs `function` in a worker's thread, which owns its pool, before its next work."""
    thread = client.engine._thread_of[worker]
    done, result = threading.Event(), []
    work = thread._work

    def once() -> bool:
        thread._work = work  # type: ignore[method-assign]
        result.append(function())
        done.set()
        return work()

    thread._work = once  # type: ignore[method-assign]
    thread.post("nobody", Abort(-1))
    assert done.wait(60)
    return result[0]


@contextmanager
def running(models: Models, config: ServeConfig) -> Iterator[Client]:
    """A started engine; its page books must be clear when it has stopped."""
    engine = Orchestrator(config, models.base_source, models.sources)
    engine.start()
    try:
        yield Client(engine)
    finally:
        engine.stop()
    for cache in engine.caches.values():
        cache.check(idle=True)
