"""Builds the engines, checks and routes requests, and keeps account of those that are alive."""

from __future__ import annotations

import itertools
import logging
import math
import os
import secrets
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from pshare_jax.cache.layout import PageLayout
from pshare_jax.cache.page_cache import PageCache
from pshare_jax.config import ServeConfig, Sharing
from pshare_jax.convert.manifest import TOKENIZER_FOLDER
from pshare_jax.engine.compiles import compile_count
from pshare_jax.engine.counters import Counters
from pshare_jax.engine.decode import DecodeEngine
from pshare_jax.engine.limits import check_config
from pshare_jax.engine.loader import (
    BaseSource,
    ModelSource,
    WeightLoader,
    checkpoint_sources,
    runtimes,
)
from pshare_jax.engine.prefill import PrefillEngine
from pshare_jax.engine.request import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    FinishReason,
    Request,
)
from pshare_jax.engine.router import Router
from pshare_jax.engine.sequence import ModelKind, Sequence, Sink
from pshare_jax.engine.stats import EngineStats, PoolStats
from pshare_jax.engine.steps import StepSpec
from pshare_jax.engine.turns import Turns
from pshare_jax.errors import EngineDeadError, QueueFullError, RequestError, UnknownModelError
from pshare_jax.kernels.backends import CPU_FFI, backend_for, on_mesh
from pshare_jax.sharding.mesh import carve, request_cpu_devices
from pshare_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelInfo:
    """A served model as clients see it; `created` is in Unix seconds."""

    name: str
    parent: str
    sharing: Sharing
    kind: ModelKind
    tail: int
    created: int


class Orchestrator:
    """The whole engine: prefill engines, decode engines, and the requests on their way.

    `start()` compiles and starts; then `submit` and `abort` may be called from any thread.

    Args:
        config: the serving configuration.
        base: the prefill module.
        sources: the served models.
        tokenizer: the base's tokenizer.

    Raises:
        ConfigError: a configuration that cannot be served, by key.
        CheckpointError: weights that cannot be loaded.
    """

    def __init__(
        self,
        config: ServeConfig,
        base: BaseSource,
        sources: list[ModelSource],
        tokenizer: Tokenizer | None = None,
    ):
        self.config = config
        self.model_config = base.config
        self.ready = False
        self.dead: str | None = None
        self._tokenizer = tokenizer
        layout = PageLayout.of(base.config, config.page_size, compute_dtype(config))
        sizes = check_config(config, base.config, layout)
        self._runtimes = runtimes(base, sources, config.decode.engines)
        created = int(time.time())
        parent = Path(config.base).name
        self.models = {
            name: ModelInfo(name, parent, m.sharing, m.kind, m.tail, created)
            for name, m in self._runtimes.items()
        }
        prefill_meshes, decode_meshes = carve(
            jax.devices(),
            config.prefill.engines,
            config.prefill.tensor_parallel,
            config.decode.engines,
            config.decode.tensor_parallel,
        )
        backend = backend_for(config.kernel_backend, jax.default_backend())
        loader = WeightLoader(base, sources, backend)
        self._counters = Counters()
        self._one_processor = decode_meshes[0].devices.flat[0].platform == "cpu"
        self._decode = [
            DecodeEngine(
                index=i,
                mesh=mesh,
                groups=loader.decode(mesh, i, self._runtimes),
                spec=StepSpec(base.config, on_mesh(backend, mesh.size), mesh),
                layout=layout,
                num_pages=sizes.decode,
                config=config.decode,
                max_model_len=config.max_model_len,
                counters=self._counters,
                on_preempt=self._route,
                on_room=self._notify_prefill,
                on_dead=self._die,
            )
            for i, mesh in enumerate(decode_meshes)
        ]
        self._prefill = [
            PrefillEngine(
                index=i,
                mesh=mesh,
                weights=loader.prefill(mesh),
                spec=StepSpec(base.config, on_mesh(backend, mesh.size), mesh),
                layout=layout,
                num_pages=sizes.prefill,
                chunk_buckets=config.prefill.chunk_buckets,
                max_model_len=config.max_model_len,
                decoders=self._decode,
                counters=self._counters,
                on_dead=self._die,
            )
            for i, mesh in enumerate(prefill_meshes)
        ]
        self._router = Router(self._prefill, [engine.cache for engine in self._decode])
        self._live: dict[str, Sequence] = {}
        self._lock = threading.Lock()
        self._order = itertools.count()
        self._compiles_at_start = 0

    @classmethod
    def from_config(cls, config: ServeConfig) -> Orchestrator:
        """Loads the checkpoints that `config` names.

        Raises:
            ConfigError: a configuration that cannot be served, by key.
            CheckpointError: a checkpoint that cannot be used, by file and tensor.
            CertificateError: a decode module that does not fit the base.
        """
        prepare_jax(config)
        base, sources = checkpoint_sources(config, compute_dtype(config))
        tokenizer = Tokenizer.load(Path(config.base) / TOKENIZER_FOLDER)
        return cls(config, base, sources, tokenizer)

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer.

        Raises:
            RuntimeError: the engine was built without one.
        """
        if self._tokenizer is None:
            raise RuntimeError("this engine was built without a tokenizer")
        return self._tokenizer

    @property
    def caches(self) -> dict[str, PageCache]:
        """Page book-keeping by engine name (`prefill0`, `decode0`, ...)."""
        return {engine.name: engine.cache for engine in (*self._prefill, *self._decode)}

    def start(self) -> None:
        """Compiles everything that serving runs, then starts the engine threads. Blocks."""
        started = time.monotonic()
        compile_count()
        for engine in (*self._decode, *self._prefill):
            engine.warm_up()
        logger.info("warm-up took %.1f s", time.monotonic() - started)
        self._compiles_at_start = compile_count()
        turns = Turns() if self._one_processor else None
        for engine in (*self._decode, *self._prefill):
            if turns is not None:
                engine.share_processor(turns)
            engine.start()
        self.ready = True

    def submit(self, request: Request, sink: Sink) -> None:
        """Takes a request; its events go to `sink`, from engine threads, in order.

        Raises:
            UnknownModelError: no model of that name.
            RequestError: a prompt or parameter that can never be served.
            QueueFullError: too many requests are waiting.
            EngineDeadError: the engine has failed, or is not started.
        """
        if self.dead is not None:
            raise EngineDeadError(f"the engine has failed: {self.dead}")
        if not self.ready:
            raise EngineDeadError("the engine is not running")
        model = self._runtimes.get(request.model)
        if model is None:
            raise UnknownModelError(f"model {request.model!r} is not served", "model")
        self._check(request)
        params = request.params
        ends = set(params.stop_token_ids)
        if not params.ignore_eos and self._tokenizer is not None:
            ends |= set(self._tokenizer.eos_token_ids)
        sequence = Sequence(
            request,
            model,
            sink,
            order=next(self._order),
            seed=(secrets.randbits(32) if params.seed is None else params.seed) % 2**32,
            page_size=self.config.page_size,
            end_token_ids=frozenset(ends),
            on_finish=self._finished,
        )
        with self._lock:
            if request.id in self._live:
                raise RequestError(f"request id {request.id!r} is already running")
            num_waiting = len(self._live) - sum(len(e.running) for e in self._decode)
            if num_waiting >= self.config.max_queue:
                raise QueueFullError(f"{num_waiting} requests are waiting; try again later")
            self._live[request.id] = sequence
        self._route(sequence)
        # An end between the check above and the registration must not leave it waiting for ever.
        if self.dead is not None or not self.ready:
            sequence.finish(FinishReason.ERROR, self.dead or "the engine was stopped")

    def abort(self, request_id: str) -> None:
        """Ends a request; its last event says ABORT. Unknown ids are ignored."""
        with self._lock:
            sequence = self._live.get(request_id)
        if sequence is not None:
            sequence.abort_requested = True
            self._notify_all()

    def stop(self) -> None:
        """Ends the engine threads; requests that still run get an ERROR event."""
        self.ready = False
        for engine in (*self._prefill, *self._decode):
            engine.stop()
        self._fail_all("the engine was stopped")
        for engine in (*self._prefill, *self._decode):
            engine.release_all()

    def stats(self) -> EngineStats:
        """A snapshot of counters and gauges."""
        with self._lock:
            live = Counter(sequence.model.name for sequence in self._live.values())
        running = Counter(s.model.name for engine in self._decode for s in engine.running)
        counters = self._counters
        with counters.lock:
            return EngineStats(
                prefill_tokens=dict(counters.prefill_tokens),
                prompt_tokens=dict(counters.prompt_tokens),
                generation_tokens=dict(counters.generation_tokens),
                handoff_bytes=dict(counters.handoff_bytes),
                handoff_pages=dict(counters.handoff_pages),
                preemptions=dict(counters.preemptions),
                decode_pages=dict(counters.decode_pages),
                compiles=compile_count() - self._compiles_at_start if self.ready else 0,
                finished=dict(counters.finished),
                running={name: running[name] for name in self.models},
                waiting={name: max(live[name] - running[name], 0) for name in self.models},
                pools={name: _pool_stats(cache) for name, cache in self.caches.items()},
                busy_seconds={e.name: e.busy_seconds for e in (*self._prefill, *self._decode)},
            )

    def _route(self, sequence: Sequence) -> None:
        self._router.route(sequence)
        self._prefill[sequence.prefill_engine].submit(sequence)

    def _notify_prefill(self) -> None:
        for engine in self._prefill:
            engine.notify()

    def _notify_all(self) -> None:
        for engine in (*self._prefill, *self._decode):
            engine.notify()

    def _finished(self, sequence: Sequence, reason: FinishReason) -> None:
        with self._lock:
            self._live.pop(sequence.request.id, None)
        self._router.forget(sequence)
        self._counters.ended(sequence.model.name, reason, len(sequence.prompt))

    def _die(self, reason: str) -> None:
        self.dead = reason
        self._fail_all(f"the engine has failed: {reason}")
        self._notify_all()

    def _fail_all(self, error: str) -> None:
        with self._lock:
            live = list(self._live.values())
        for sequence in live:
            sequence.finish(FinishReason.ERROR, error)

    def _check(self, request: Request) -> None:
        """Refuses what could never be served; the server has checked ranges of wire types."""
        prompt, params = request.prompt_token_ids, request.params
        vocab = self.model_config.vocab_size
        if not prompt:
            raise RequestError("the prompt is empty; it needs at least one token", "prompt")
        if min(prompt) < 0 or max(prompt) >= vocab:
            wrong = next(t for t in prompt if not 0 <= t < vocab)
            raise RequestError(f"token id {wrong} is out of range 0..{vocab - 1}", "prompt")
        if params.max_tokens < 1:
            raise RequestError(
                f"max_tokens must be at least 1, is {params.max_tokens}", "max_tokens"
            )
        total = len(prompt) + params.max_tokens
        if total > self.config.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}; "
                f"together they exceed the context length of {self.config.max_model_len}",
                "max_tokens",
                "context_length_exceeded",
            )
        if len(params.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(f"logit_bias has more than {MAX_LOGIT_BIAS} entries", "logit_bias")
        if wrong := [t for t in params.logit_bias if not 0 <= t < vocab]:
            raise RequestError(
                f"logit_bias: token id {wrong[0]} is out of range 0..{vocab - 1}", "logit_bias"
            )
        if not all(map(math.isfinite, params.logit_bias.values())):
            raise RequestError("logit_bias: every bias must be a finite number", "logit_bias")
        if params.logprobs is not None and not 0 <= params.logprobs <= min(MAX_LOGPROBS, vocab):
            raise RequestError(f"logprobs must be 0..{MAX_LOGPROBS}", "logprobs")
        values = {
            "temperature": (params.temperature, 0.0, 100.0),
            "top_p": (params.top_p, 0.0, 1.0),
            "min_p": (params.min_p, 0.0, 1.0),
            "top_k": (params.top_k, 0, 2**31 - 1),
            "repetition_penalty": (params.repetition_penalty, 1e-3, 1e3),
            "presence_penalty": (params.presence_penalty, -1e3, 1e3),
            "frequency_penalty": (params.frequency_penalty, -1e3, 1e3),
        }
        for name, (value, low, high) in values.items():
            if not (math.isfinite(value) and low <= value <= high):
                raise RequestError(f"{name} must be {low} .. {high}, is {value}", name)


def _pool_stats(cache: PageCache) -> PoolStats:
    counts = cache.counts()
    return PoolStats(counts.total, counts.free, counts.used, counts.shared, counts.cached)


def compute_dtype(config: ServeConfig) -> jnp.dtype:
    """The dtype of weights, activations and KV.

    Unless configured it is bfloat16, but float32 on CPUs where XLA does the products, which in
    bfloat16 are slow.
    """
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    platform = jax.default_backend()
    if platform != "cpu":
        return jnp.dtype(jnp.bfloat16)
    tensor_parallel = max(config.prefill.tensor_parallel, config.decode.tensor_parallel)
    if tensor_parallel > 1 or backend_for(config.kernel_backend, platform) != CPU_FFI:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(jnp.bfloat16)


def prepare_jax(config: ServeConfig) -> None:
    """Sets up virtual CPU devices and the compilation cache; before JAX is first used.

    Raises:
        ConfigError: JAX is running already with too few CPU devices.
    """
    prefill, decode = config.prefill, config.decode
    request_cpu_devices(
        prefill.engines * prefill.tensor_parallel + decode.engines * decode.tensor_parallel
    )
    if config.compilation_cache_dir and jax.config.values["jax_compilation_cache_dir"] is None:
        folder = os.path.expanduser(config.compilation_cache_dir)
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
