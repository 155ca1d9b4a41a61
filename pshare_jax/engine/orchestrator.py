"""The whole engine in one process: builds it, takes requests, and keeps account of the living."""

from __future__ import annotations

import itertools
import logging
import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from pshare_jax.cluster.thread import DispatcherThread, WorkerThread
from pshare_jax.config import DecodeConfig, ServeConfig
from pshare_jax.convert.manifest import TOKENIZER_FOLDER, read_manifest
from pshare_jax.core.constraints import GrammarSpec
from pshare_jax.core.dispatcher import Dispatcher
from pshare_jax.core.messages import DISPATCHER, Message, Request, RequestOutput
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.sharing_map import SharingMap, sharing_map
from pshare_jax.core.prompt_scores import PromptScorer, is_scored
from pshare_jax.core.router import Router
from pshare_jax.core.sessions import SessionPolicy
from pshare_jax.core.stats import EngineStats, PoolStats
from pshare_jax.engine.assembly import Assembly
from pshare_jax.engine.checks import check_request
from pshare_jax.engine.devices import compute_dtype, place, prepare_jax
from pshare_jax.engine.host_memory import return_freed_memory
from pshare_jax.engine.kv_store import EngineStore
from pshare_jax.engine.limits import check_config
from pshare_jax.engine.loader import (
    BaseSource,
    ModelSource,
    WeightLoader,
    checkpoint_sources,
    model_specs,
)
from pshare_jax.engine.modules import Modules
from pshare_jax.engine.queue_room import QueueRoom
from pshare_jax.engine.served import ModelInfo, ServedModels, free_retired
from pshare_jax.errors import (
    EngineDeadError,
    PshareError,
    QueueFullError,
    RequestError,
    UnknownModelError,
)
from pshare_jax.kernels.backends import backend_for
from pshare_jax.runtime.compiles import compile_count
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.text.grammar import GrammarCompiler
from pshare_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Sink = Callable[[RequestOutput], None]


@dataclass(frozen=True)
class _Live:
    model: str
    sink: Sink
    grammar: GrammarSpec | None


class Orchestrator:
    """The whole engine: dispatcher, workers, and the requests on their way.

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
        self._tokenizer = tokenizer
        self.grammars: GrammarCompiler | None = None
        if tokenizer is not None and tokenizer.eos_token_ids:
            self.grammars = GrammarCompiler(tokenizer)
        layout = PageLayout.of(base.config, config.page_size, compute_dtype(config, base.config))
        sizes = check_config(config, base.config, layout)
        meshes = place(config)
        specs = model_specs(base, sources, len(meshes.decode))
        self._served = ServedModels(config, base, sources, specs)
        backend = backend_for(config.kernel_backend, jax.default_backend())
        loader = WeightLoader(base, sources, backend, config.decode, layout.dtype)
        assembly = Assembly(
            config, base.config, layout, sizes, backend, loader, specs, self.grammars
        )
        self.workers = assembly.build(meshes)
        loader.built()
        executors = {worker.name: worker.executor for worker in self.workers.decode}
        self._modules = Modules(base, loader, executors, config.decode.max_full, sources, specs)
        self._threads = [
            WorkerThread(name, workers, self._carry, self._worker_failed)
            for name, workers in self.workers.threads(meshes.one_processor)
        ]
        self._thread_of = {w.name: thread for thread in self._threads for w in thread.workers}
        router = Router(self.workers.prefill_info(), self.workers.decode_info())
        apart = not (meshes.one_processor or meshes.one_pool)
        policy = SessionPolicy(
            config.reply_kv == "ahead",
            config.sessions.max_ttl_seconds,
            # Where decoding leaves no idle turn, there is time once a reply has ended at best.
            streaming_step=min(config.prefill.chunk_buckets) if apart else 0,
        )
        self._dispatcher = Dispatcher(specs, router, config.page_size, policy)
        self._control = DispatcherThread(self._deliver, self._dispatcher_failed)
        self._layout = layout
        self.store: EngineStore | None = None
        self._failed: dict[str, str] = {}
        self._live: dict[str, _Live] = {}
        self._lock = threading.Lock()
        self._order = itertools.count()
        self._scorer = PromptScorer(
            self._dispatcher, _max_probes(config.decode), lambda: next(self._order)
        )
        self._room = QueueRoom(config.max_queue)
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
        dtype = compute_dtype(config, read_manifest(config.base).config)
        base, sources = checkpoint_sources(config, dtype)
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
    def models(self) -> dict[str, ModelInfo]:
        """The served models by name."""
        return self._served.infos

    @property
    def caches(self) -> dict[str, PageCache]:
        """Page accounts by worker name (`prefill0`, `decode0`, ...)."""
        return {w.name: w.cache for w in (*self.workers.prefill, *self.workers.decode)}

    @property
    def failed_workers(self) -> dict[str, str]:
        """Workers that have failed, and why."""
        return dict(self._failed)

    @property
    def dead(self) -> str | None:
        """Why no model can be served any more, if so."""
        if self._failed and not any(map(self._is_served, self._served.specs)):
            return self._why()
        return None

    def start(self) -> None:
        """Compiles everything that serving runs, then starts the threads. Blocks.

        Raises:
            ConfigError: the KV store cannot be made or used.
        """
        started = time.monotonic()
        compile_count()
        stores = bool(self.config.kv_store.path)
        self.workers.warm_up(stores=stores)
        if stores:
            self.store = EngineStore(
                self.config.kv_store, self._layout, self.workers.prefill, self._tokenizer
            )
            self.store.attach(lambda to, message: self._thread_of[to].post(to, message))
        return_freed_memory()
        logger.info("warm-up took %.1f s", time.monotonic() - started)
        self._compiles_at_start = compile_count()
        self._control.start()
        for thread in self._threads:
            thread.start()
        self.ready = True

    def submit(self, request: Request, sink: Sink) -> None:
        """Takes a request; its events go to `sink`, from the dispatcher's thread, in order.

        Raises:
            UnknownModelError: no model of that name.
            RequestError: a prompt or parameter that can never be served.
            QueueFullError: too many requests are waiting.
            EngineDeadError: the engine has failed, or is not started.
        """
        self._check_running()
        if request.model not in self._served.specs:
            raise UnknownModelError(f"model {request.model!r} is not served", "model")
        if self._failed and not self._is_served(request.model):
            raise EngineDeadError(f"model {request.model} has no worker left: {self._why()}")
        check_request(request, self.model_config.vocab_size, self.config.max_model_len)
        params = request.params
        ends = set(params.stop_token_ids)
        if self._tokenizer is not None and not (params.ignore_eos and params.grammar is None):
            ends |= set(self._tokenizer.eos_token_ids)
        seed = (secrets.randbits(32) if params.seed is None else params.seed) % 2**32
        self._hold(params.grammar)
        try:
            order = self._register(request, sink)
        except PshareError:
            self._release(params.grammar)
            raise
        now = time.monotonic()
        self._control.post(lambda: self._take(request, order, seed, frozenset(ends), now))

    def abort(self, request_id: str, *, complete: bool = False) -> None:
        """Ends a request; its last event says ABORT. Unknown ids are ignored.

        A reply that is `complete` was cut where it was to end, and the next prompt may go on from
        it.
        """
        self._control.post(lambda: self._abort(request_id, complete))

    def load_module(
        self, name: str, folder: str | Path | ModelSource, *, replace: bool = False
    ) -> ModelInfo:
        """Serves one more decode module; compiles nothing, and others go on meanwhile.

        Blocks while it is loaded; from any thread. With `replace` it takes the place of a module of
        that name, with which requests that run go on. See `ServedModels.load`.

        Raises:
            EngineDeadError: the engine does not run.
            RequestError: the name is taken, or there is no room.
            CheckpointError, CertificateError, ConfigError: no decode module of this base.
        """
        self._check_running()
        return self._served.load(
            name,
            folder,
            self._modules,
            lambda name, spec: self._control.post(lambda: self._dispatcher.set_model(name, spec)),
            replace=replace,
        )

    def unload_module(self, name: str) -> None:
        """Takes no more requests for a decode module; those that run end with it.

        Raises:
            EngineDeadError: the engine does not run.
            UnknownModelError: no model of that name.
            RequestError: the base, or an isolated module.
        """
        self._check_running()
        self._served.unload(
            name, lambda name: self._control.post(lambda: self._dispatcher.remove_model(name))
        )

    def stop(self) -> None:
        """Ends the threads; requests that still run get an ERROR event."""
        self.ready = False
        for thread in self._threads:
            thread.stop()
        self._control.post(lambda: self._fail_all("the engine was stopped"))
        self._control.stop()
        for thread in self._threads:
            for worker in thread.workers:
                worker.release_all()
        if self.store is not None:
            self.store.close()

    def stats(self) -> EngineStats:
        """A snapshot of counters and gauges."""
        with self._lock:
            live = Counter(entry.model for entry in self._live.values())
        running = self._running()
        prefill = {w.name: w.core.stats for w in self.workers.prefill}
        decode = {w.name: w.core.stats for w in self.workers.decode}
        requests = self._dispatcher.stats
        store, tiers = self.store.stats() if self.store is not None else ({}, {})
        total = self._served.total
        # Those that were unloaded may still run.
        names = {**dict.fromkeys(self.models), **live, **running}
        return EngineStats(
            prefill_tokens=total(stats.prefill_tokens for stats in prefill.values()),
            ahead_tokens=total(stats.ahead_tokens for stats in prefill.values()),
            foreseen_tokens=total(stats.foreseen_tokens for stats in prefill.values()),
            prompt_tokens=dict(requests.prompt_tokens),
            generation_tokens=total(stats.generation_tokens for stats in decode.values()),
            forced_tokens=total(stats.forced_tokens for stats in decode.values()),
            handoff_bytes=total(stats.handoff_bytes for stats in decode.values()),
            handoff_pages=total(stats.handoff_pages for stats in decode.values()),
            failed_transfers={name: stats.failed_transfers for name, stats in decode.items()},
            preemptions=total(stats.preemptions for stats in decode.values()),
            decode_pages={
                (name, kind): count
                for name, stats in decode.items()
                for kind, count in dict(stats.pages).items()
            },
            compiles=compile_count() - self._compiles_at_start if self.ready else 0,
            finished=dict(requests.finished),
            running={name: running[name] for name in names},
            waiting={name: max(live[name] - running[name], 0) for name in names},
            pools={name: _pool_stats(cache) for name, cache in self.caches.items()},
            busy_seconds={
                name: seconds for t in self._threads for name, seconds in t.busy_seconds.items()
            },
            store=store,
            tiers=tiers,
        )

    def _hold(self, grammar: GrammarSpec | None) -> None:
        """Has the grammar of a request compiled and kept; callers who must not wait did so before.

        Raises:
            RequestError: it cannot be used.
        """
        if grammar is None:
            return
        if self.grammars is None:
            raise RequestError("a grammar needs a tokenizer with an end token", "grammar")
        self.grammars.hold(grammar, "grammar")

    def _release(self, grammar: GrammarSpec | None) -> None:
        if grammar is not None and self.grammars is not None:
            self.grammars.release(grammar)

    def _register(self, request: Request, sink: Sink) -> int:
        """Counts a request among the living; its place in the order of arrival.

        Raises:
            RequestError: its id is taken.
            QueueFullError: too many requests are waiting.
        """
        with self._lock:
            if request.id in self._live:
                raise RequestError(f"request id {request.id!r} is already running")
            num_waiting = len(self._live) - sum(self._running().values())
            if self._room.is_full(request.owner, num_waiting):
                seconds = self._room.retry_after(time.monotonic())
                raise QueueFullError(
                    f"{num_waiting} requests are waiting; try again in {math.ceil(seconds)} s",
                    seconds,
                )
            self._room.add(request.id, request.owner)
            self._live[request.id] = _Live(request.model, sink, request.params.grammar)
            return next(self._order)

    def _check_running(self) -> None:
        if self.dead is not None:
            raise EngineDeadError(f"the engine has failed: {self.dead}")
        if not self.ready:
            raise EngineDeadError("the engine is not running")

    def sharing_map(self) -> SharingMap:
        """What the pools hold, who computed it and who reads it now: see `core.pages`."""
        return sharing_map(self.caches, {w.name: w.core.readers() for w in self.workers.decode})

    def _is_served(self, model: str) -> bool:
        """Whether there are workers left that can cover prompts and generate for a model."""
        spec = self._served.specs.get(model)
        hosts = spec.decode_workers if spec is not None else ()
        alive = [worker.name for worker in self.workers.prefill if worker.name not in self._failed]
        able = [name for name in hosts if name not in self._failed]
        return bool(alive and able) and DISPATCHER not in self._failed

    def _why(self) -> str:
        return "; ".join(f"{name}: {why}" for name, why in self._failed.items())

    def _running(self) -> Counter[str]:
        return Counter(self._served.total(w.core.running() for w in self.workers.decode))

    def _take(
        self, request: Request, order: int, seed: int, ends: frozenset[int], now: float
    ) -> None:
        to = self._scorer if is_scored(request.params) else self._dispatcher
        to.submit(request, order=order, seed=seed, end_token_ids=ends, now=now)
        self._dispatcher.routed(request.id, time.monotonic())

    def _abort(self, request_id: str, complete: bool = False) -> None:
        outputs = self._scorer.abort(request_id)
        if outputs is None:
            self._dispatcher.abort(request_id, complete=complete)
        for output in outputs or ():
            self._emit(output)

    def _fail_all(self, error: str) -> None:
        for output in self._scorer.fail_all(error):
            self._emit(output)
        self._dispatcher.fail_all(error)

    def _carry(self, source: str, to: str, message: Message) -> None:
        """Carries a worker's message; in that worker's thread."""
        if to == DISPATCHER:
            now = time.monotonic()
            self._control.post(lambda: self._dispatcher.receive(source, message, now))  # type: ignore[arg-type]
        else:
            self._thread_of[to].post(to, message)

    def _deliver(self) -> None:
        """Carries what the dispatcher has to say; in its thread."""
        dispatcher = self._dispatcher
        while dispatcher.outbox or dispatcher.outputs or dispatcher.retired:
            messages, dispatcher.outbox = dispatcher.outbox, []
            outputs, dispatcher.outputs = dispatcher.outputs, []
            for to, message in messages:
                self._post(to, message)
            free_retired(dispatcher, self._modules, self._post)
            for output in outputs:
                for heard in self._scorer.take(output):
                    self._emit(heard)

    def _post(self, to: str, message: Message) -> None:
        self._thread_of[to].post(to, message)

    def _emit(self, output: RequestOutput) -> None:
        with self._lock:
            live = self._live.get(output.request_id)
            if output.token_ids:
                self._room.started(output.request_id, time.monotonic())
            if output.finish_reason is not None:
                self._room.ended(output.request_id)
                self._live.pop(output.request_id, None)
                self._release(None if live is None else live.grammar)
        if live is None:
            return
        try:
            live.sink(output)
        except Exception:
            # The dispatcher serves others too.
            logger.exception("the sink of request %s has failed", output.request_id)
            self._abort(output.request_id)

    def _worker_failed(self, worker: str, reason: str) -> None:
        self._failed[worker] = reason
        self.workers.exchange.drop_worker(worker)
        self._control.post(lambda: self._dispatcher.lose_worker(worker, reason))

    def _dispatcher_failed(self, reason: str) -> None:
        self._failed[DISPATCHER] = reason
        self._fail_all(f"the engine has failed: {reason}")


def _max_probes(decode: DecodeConfig) -> int:
    """Probes at a time: half of what the decode workers batch, so that others find room."""
    return max(min(decode.max_num_seqs, max(decode.batch_buckets)) // 2, 1) * decode.engines


def _pool_stats(cache: PageCache) -> PoolStats:
    counts = cache.counts()
    return PoolStats(counts.total, counts.free, counts.used, counts.shared, counts.cached)
