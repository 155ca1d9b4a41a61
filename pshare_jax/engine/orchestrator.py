"""The whole engine in one process: builds it, takes requests, and keeps account of the living."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import queue
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from pshare_jax.cluster.thread import WorkerThread
from pshare_jax.config import Reasoning, ServeConfig
from pshare_jax.convert.manifest import TOKENIZER_FOLDER, read_manifest
from pshare_jax.core.balance import BalancePolicy
from pshare_jax.core.dispatcher import Dispatcher
from pshare_jax.core.messages import DISPATCHER, Message
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.sharing_map import SharingMap, sharing_map
from pshare_jax.core.router import NoWorkerError, Router
from pshare_jax.core.sessions import SessionPolicy
from pshare_jax.core.stats import EngineStats
from pshare_jax.engine.assembly import Assembly
from pshare_jax.engine.devices import compute_dtype, page_dtype, place, prepare_jax
from pshare_jax.engine.front import Front
from pshare_jax.engine.kv_store import EngineStore
from pshare_jax.engine.limits import check_config
from pshare_jax.engine.loader import WeightLoader
from pshare_jax.engine.modules import Modules
from pshare_jax.engine.served import ModelInfo, ServedModels, free_retired
from pshare_jax.engine.snapshot import worker_stats
from pshare_jax.engine.sources import BaseSource, ModelSource, checkpoint_sources, model_specs
from pshare_jax.engine.weight_format import served_model
from pshare_jax.errors import EngineDeadError
from pshare_jax.kernels.backends import CPU_FFI, backend_for
from pshare_jax.models.packed import unsupported
from pshare_jax.runtime.compiles import compile_count
from pshare_jax.runtime.host_memory import return_freed_memory
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
"""How long the dispatcher's thread is waited for."""


class Orchestrator(Front):
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
        dtype = compute_dtype(config, base.config)
        self._computed = dtype.name
        base = dataclasses.replace(base, kv_dtype=config.kv_dtype)
        layout = PageLayout.of(base.config, config.page_size, page_dtype(config, base.config))
        sizes = check_config(config, base.config, layout)
        meshes = place(config)
        specs = model_specs(base, sources, len(meshes.decode))
        served = ServedModels(config, base, sources, specs)
        super().__init__(config, base.config, tokenizer, served, itertools.count())
        backend = backend_for(config.kernel_backend, jax.default_backend())
        if backend == CPU_FFI and (reason := unsupported(base.config)) is not None:
            logger.info("layers are computed by XLA, not in C++, which does not have: %s", reason)
        loader = WeightLoader(base, sources, backend, config.decode, dtype)
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
        self._router = Router(
            self.workers.prefill_info(), self.workers.decode_info(), config.router.policy
        )
        apart = not (meshes.one_processor or meshes.one_pool)
        policy = SessionPolicy(
            config.reply_kv == "ahead",
            config.sessions.max_ttl_seconds,
            prefetch=config.kv_store.prefetch != "off",
            # Where decoding leaves no idle turn, there is time once a reply has ended at best.
            streaming_step=min(config.prefill.chunk_buckets) if apart else 0,
        )
        self._dispatch_with(
            Dispatcher(specs, self._router, config.page_size, policy, _balance(config))
        )
        self._layout = layout
        self.store: EngineStore | None = None
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
        dtype = compute_dtype(config, served_model(config, read_manifest(config.base)))
        base, sources = checkpoint_sources(config, dtype)
        tokenizer = Tokenizer.load(Path(config.base) / TOKENIZER_FOLDER)
        return cls(config, base, sources, tokenizer)

    @property
    def models(self) -> dict[str, ModelInfo]:
        """The served models by name."""
        return self._served.infos

    @property
    def caches(self) -> dict[str, PageCache]:
        """Page accounts by worker name (`prefill0`, `decode0`, ...)."""
        return {w.name: w.cache for w in (*self.workers.prefill, *self.workers.decode)}

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
                self.config.kv_store,
                self._layout,
                self._computed,
                self.workers.prefill,
                self._tokenizer,
            )
            self.store.attach(lambda to, message: self._thread_of[to].post(to, message))
        return_freed_memory()
        logger.info("warm-up took %.1f s", time.monotonic() - started)
        self._compiles_at_start = compile_count()
        self._control.start()
        for thread in self._threads:
            thread.start()
        self.ready = True

    def load_module(
        self,
        name: str,
        folder: str | Path | ModelSource,
        *,
        replace: bool = False,
        tool_parser: str | None = None,
        reasoning: Reasoning | None = None,
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
            tool_parser=tool_parser,
            reasoning=reasoning,
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

    def give_mesh(self, worker: str) -> None:
        """Has a mesh that may do either work for `worker` from now on, such as `prefill2`.

        Rows that run there go on elsewhere, with their KV; compiles nothing. Blocks until that has
        been decided, not until they have gone.

        Raises:
            EngineDeadError: the engine does not run.
            NoWorkerError: no such worker, or nobody would be left to do what the mesh does now.
        """
        self._check_running()
        outcome: queue.SimpleQueue[NoWorkerError | None] = queue.SimpleQueue()

        def act() -> None:
            try:
                self._dispatcher.give_mesh(worker)
            except NoWorkerError as error:
                outcome.put(error)
            else:
                outcome.put(None)

        self._control.post(act)
        try:
            error = outcome.get(timeout=ANSWER_SECONDS)
        except queue.Empty:
            raise EngineDeadError("the engine does not answer; it may have been stopped") from None
        if error is not None:
            raise error

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
        requests = self._dispatcher.stats
        store, tiers = self.store.stats() if self.store is not None else ({}, {})
        busy = {name: seconds for t in self._threads for name, seconds in t.busy_seconds.items()}
        stats = worker_stats(self.workers.prefill, self.workers.decode, busy, self._served.total)
        running = Counter(stats.running)
        # Those that were unloaded may still run.
        names = {**dict.fromkeys(self.models), **live, **running}
        return dataclasses.replace(
            stats,
            prompt_tokens=dict(requests.prompt_tokens),
            compiles=compile_count() - self._compiles_at_start if self.ready else 0,
            finished=dict(requests.finished),
            running={name: running[name] for name in names},
            waiting={name: max(live[name] - running[name], 0) for name in names},
            store=store,
            tiers=tiers,
            **self._roles(),
        )

    def _roles(self) -> dict[str, dict[str, Any]]:
        """What there is to say of meshes that may do either."""
        if not self.workers.num_prefill:
            return {}
        decode = {w.name: w.core.stats.moved_rows for w in self.workers.decode}
        names = [w.name for w in (*self.workers.prefill, *self.workers.decode)]
        working = set(self._router.working(names))
        return {"moved_rows": decode, "working": {name: name in working for name in names}}

    def sharing_map(self) -> SharingMap:
        """What the pools hold, who computed it and who reads it now: see `core.pages`."""
        readers = {w.name: w.core.readers() for w in self.workers.decode}
        return sharing_map(self.caches, readers, self.store.held if self.store else None)

    def _is_served(self, model: str) -> bool:
        """Whether there are workers left that can cover prompts and generate for a model."""
        spec = self._served.specs.get(model)
        hosts = spec.decode_workers if spec is not None else ()
        alive = [worker.name for worker in self.workers.prefill if worker.name not in self._failed]
        able = [name for name in hosts if name not in self._failed]
        return bool(alive and able) and DISPATCHER not in self._failed

    def _running(self) -> Counter[str]:
        return Counter(self._served.total(w.core.running() for w in self.workers.decode))

    def _carry(self, source: str, to: str, message: Message) -> None:
        """Carries a worker's message; in that worker's thread."""
        if to == DISPATCHER:
            now = time.monotonic()
            self._control.post(lambda: self._dispatcher.receive(source, message, now))  # type: ignore[arg-type]
        else:
            self._thread_of[to].post(to, message)

    def _post(self, to: str, message: Message) -> None:
        self._thread_of[to].post(to, message)

    def _free_retired(self) -> None:
        free_retired(self._dispatcher, self._modules, self._post)

    def _worker_failed(self, worker: str, reason: str) -> None:
        self._failed[worker] = reason
        self.workers.exchange.drop_worker(worker)
        self._control.post(lambda: self._dispatcher.lose_worker(worker, reason))


def _balance(config: ServeConfig) -> BalancePolicy | None:
    if config.router.roles == "fixed" or not config.router.backlog_tokens:
        return None
    return BalancePolicy(config.router.backlog_tokens, config.decode.max_num_seqs)
