"""The engine as a frontend process has it: requests here, workers in processes elsewhere."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

from pshare_jax.cluster import wire
from pshare_jax.cluster.discovery import check_workers
from pshare_jax.cluster.limits import check_cluster
from pshare_jax.cluster.link import LinkTimes
from pshare_jax.cluster.links import Links
from pshare_jax.cluster.secret import read_token
from pshare_jax.cluster.tls import cluster_tls
from pshare_jax.config import Reasoning, ServeConfig
from pshare_jax.convert.manifest import TOKENIZER_FOLDER
from pshare_jax.core import messages as m
from pshare_jax.core.dispatcher import Dispatcher
from pshare_jax.core.load import Load, load_of
from pshare_jax.core.messages import DISPATCHER, Message
from pshare_jax.core.models import ModelSpec
from pshare_jax.core.pages.sharing_map import SharingMap, map_of
from pshare_jax.core.router import Router
from pshare_jax.core.sessions import SessionPolicy
from pshare_jax.core.stats import EngineStats, together
from pshare_jax.engine.cluster_modules import ClusterModules
from pshare_jax.engine.front import Front
from pshare_jax.engine.served import ModelInfo, ServedModels
from pshare_jax.engine.shape import cluster_shape
from pshare_jax.engine.sources import BaseSource, ModelSource, checkpoint_sources, model_specs
from pshare_jax.errors import ConfigError, EngineDeadError
from pshare_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

WAIT_SECONDS = 5.0
"""Between two log lines about workers that a frontend waits for at its start."""

LOAD_SECONDS = 2.0
"""How long who asks for the load waits for it."""


class ClusterEngine(Front):
    """Dispatcher and requests of one frontend; the counterpart of `Orchestrator`.

    `start()` waits until every model can be served; then `submit` and `abort` may be called from
    any thread.

    Args:
        config: the serving configuration, the same in all processes; names the workers.
        base: the prefill module; its weights are not loaded.
        sources: the served models; likewise.
        tokenizer: the base's tokenizer.

    Raises:
        ConfigError: a configuration that cannot be served, by key.
    """

    def __init__(
        self,
        config: ServeConfig,
        base: BaseSource,
        sources: list[ModelSource],
        tokenizer: Tokenizer | None = None,
    ):
        check_cluster(config)
        cluster = config.cluster
        check_workers(cluster.workers)
        # Who generates for a model is what workers say.
        specs = {
            name: msgspec.structs.replace(spec, decode_workers=())
            for name, spec in model_specs(base, sources, config.decode.engines).items()
        }
        self.incarnation = wire.new_incarnation()
        served = ServedModels(config, base, sources, specs)
        orders = wire.arrival_orders(self.incarnation)
        super().__init__(config, base.config, tokenizer, served, orders)
        policy = SessionPolicy(
            config.reply_kv == "ahead",
            config.sessions.max_ttl_seconds,
            prefetch=config.kv_store.prefetch != "off",
        )
        # Other frontends may send sequences to the same workers.
        self._router = Router([], [], config.router.policy, replicas=2, lends=True)
        dispatcher = Dispatcher(
            specs,
            self._router,
            config.page_size,
            policy,
            ids=wire.sequence_ids(self.incarnation),
            max_lost=cluster.max_attempts,
            patience=cluster.patience_seconds,
        )
        self._dispatch_with(dispatcher)
        self._hosts: dict[str, set[str]] = {name: set() for name in specs}
        self._configured: dict[str, frozenset[str]] = {}
        self._covering: set[str] = set()
        self._leaving: set[str] = set()
        self._served_now = threading.Event()
        self._stopped = threading.Event()
        shape = cluster_shape(config, base, sources, specs)
        tls = cluster_tls(cluster)
        self._links = Links(
            cluster.workers,
            wire.Hello(wire.PROTOCOL, self.incarnation, shape, secrets.token_hex(16)),
            read_token(cluster.token_file),
            tls.client if tls else None,
            LinkTimes(beat_seconds=cluster.beat_seconds, lost_seconds=cluster.lost_seconds),
            on_join=self._joined,
            on_message=self._heard,
            on_load=self._note_others,
            on_drain=self._drains,
            on_lost=self._lost,
            may_pass=self._may_pass,
            on_modules=lambda frame: self._modules.hear(frame),
            each_beat=self._tick,
        )
        self._modules = ClusterModules(base, served, self._links.tell, self._serve, self._host)
        self._modules.heard = lambda name: self.heard(name)

    @classmethod
    def from_config(cls, config: ServeConfig) -> ClusterEngine:
        """Reads the manifests of the checkpoints that `config` names, and no tensors.

        Raises:
            ConfigError: a configuration that cannot be served, by key.
            CheckpointError: a checkpoint that cannot be used, by file.
            CertificateError: a decode module that does not fit the base.
        """
        base, sources = checkpoint_sources(config, None)
        return cls(config, base, sources, Tokenizer.load(Path(config.base) / TOKENIZER_FOLDER))

    @property
    def dead(self) -> str | None:
        """Why nothing can be served any more, if so; workers that are lost may come again."""
        return self._failed.get(DISPATCHER)

    @property
    def failed_workers(self) -> dict[str, str]:
        """Worker processes that are not linked, and why."""
        return {**self._failed, **self._links.missing()}

    def start(self) -> None:
        """Links to the workers, and waits until there is one for everything. Blocks."""
        self._control.start()
        self._links.start()
        while not self._served_now.wait(WAIT_SECONDS):
            if self._stopped.is_set():
                return
            for address, why in self._links.missing().items():
                logger.info("waiting for %s: %s", address, why)
        self._modules.settle()
        self.ready = True

    def stop(self) -> None:
        """Ends the links; requests that still run get an ERROR event."""
        self.ready = False
        self._stopped.set()
        self._control.post(lambda: self._fail_all("the engine was stopped"))
        self._control.stop()
        self._links.stop()
        self._modules.close()

    def set_workers(self, addresses: Sequence[str]) -> None:
        """Has these worker processes from now on, and no others; returns at once.

        Sequences of a worker that is not named any more go on elsewhere: who wants to keep them
        there until they end drains it first.

        Raises:
            ConfigError: an address that is none, or none at all.
        """
        if not addresses:
            raise ConfigError("a frontend needs at least one worker")
        check_workers(addresses)
        self._links.set_addresses(addresses)

    def workers(self) -> dict[str, str]:
        """Addresses of the worker processes, and why there is no link; empty where there is."""
        return self._links.states()

    def load(self) -> Load:
        """What waits and runs. Blocks until the dispatcher has said so.

        Raises:
            EngineDeadError: it does not.
        """
        found: list[Load] = []
        done = threading.Event()

        def look() -> None:
            waiting, sequences = (sum(of.values()) for of in self._router.loads())
            workers = together(self._links.stats())
            found.append(load_of(workers, self.incarnation, waiting, sequences))
            done.set()

        self._control.post(look)
        if not done.wait(LOAD_SECONDS):
            raise EngineDeadError("the dispatcher does not get on")
        return found[0]

    def load_module(
        self,
        name: str,
        folder: str | Path,
        *,
        replace: bool = False,
        tool_parser: str | None = None,
        reasoning: Reasoning | None = None,
    ) -> ModelInfo:
        """Serves one more decode module, at all frontends, once a decode worker has loaded it.

        Blocks meanwhile; from any thread. See `ClusterModules.load`.

        Raises:
            EngineDeadError: the engine does not run.
            RequestError: the name is taken, or no decode worker has room.
            CheckpointError, CertificateError, ConfigError: no decode module of this base.
        """
        self._check_running()
        entry = self._served.entry(name, str(folder), tool_parser, reasoning)
        return self._modules.load(entry, replace=replace)

    def unload_module(self, name: str) -> None:
        """Takes no more requests for a decode module; those that run end with it.

        Raises:
            EngineDeadError: the engine does not run.
            UnknownModelError: no model of that name.
            RequestError: the base, or an isolated module.
        """
        self._check_running()
        self._modules.unload(name)

    def stats(self) -> EngineStats:
        """What all workers have done, as they last said, and the requests of this frontend."""
        with self._lock:
            live = Counter(entry.model for entry in self._live.values())
        requests, running = self._dispatcher.stats, self._running()
        workers = together(self._links.stats())
        names = {**dict.fromkeys(self.models), **live, **running}
        return dataclasses.replace(
            workers,
            prompt_tokens=dict(requests.prompt_tokens),
            finished=dict(requests.finished),
            running={name: running[name] for name in names},
            waiting={name: max(live[name] - running[name], 0) for name in names},
        )

    def sharing_map(self) -> SharingMap:
        """What the pools of all workers held when the last map was made: see `cluster.looks`."""
        return map_of(self._links.pools(), self.config.page_size)

    def _post(self, to: str, message: Message) -> None:
        # Of modules that come and go workers hear in other ways: they have several dispatchers.
        if not isinstance(message, m.ModelAdded | m.ModelRemoved):
            self._links.send(DISPATCHER, to, message)

    def _free_retired(self) -> None:
        while self._dispatcher.retired:
            self._modules.retired(self._dispatcher.retired.pop().name)

    def _serve(self, name: str, spec: ModelSpec | None) -> None:
        """Has a module served under a name from now on, or nothing."""
        if spec is None:
            self._control.post(lambda: self._dispatcher.remove_model(name))
        else:
            self._control.post(lambda: self._dispatcher.set_model(name, spec))

    def _host(self, worker: str, models: frozenset[str]) -> None:
        """A worker generates for these models, and for those that it was configured for."""

        def host() -> None:
            configured = self._configured.get(worker, frozenset())
            self._dispatcher.set_hosted(worker, configured | models)

        self._control.post(host)

    def _is_served(self, model: str) -> bool:
        return DISPATCHER not in self._failed

    def _running(self) -> Counter[str]:
        return Counter(self._served.total([self._dispatcher.running()]))

    def _deliver(self) -> None:
        super()._deliver()
        for worker in tuple(self._leaving):
            parts = self._links.parts_of(worker)
            if not any(self._dispatcher.needs(part) for part in parts):
                self._leaving.difference_update(parts)
                self._links.left(worker)

    def _joined(self, part: wire.Part) -> None:
        prefill = part.side == "prefill"
        self._modules.greet(part.info.name, generates=not prefill)

        def add() -> None:
            self._configured[part.info.name] = frozenset(part.models)
            self._dispatcher.add_worker(part.info, prefill=prefill, models=part.models)
            self._note(part)

        self._control.post(add)

    def _note(self, part: wire.Part) -> None:
        """Keeps account of what can be served."""
        if part.side == "prefill":
            self._covering.add(part.info.name)
        for model in part.models:
            if model in self._hosts:
                self._hosts[model].add(part.info.name)
        if self._covering and all(self._hosts.values()):
            self._served_now.set()
        self._note_lacking()

    def _note_lacking(self) -> None:
        """Says what nobody does of what was configured; who drains takes no requests any more."""
        self.lacking = self._router.unserved(self._hosts)

    def _heard(self, source: str, message: Message) -> None:
        now = time.monotonic()
        self._control.post(lambda: self._dispatcher.receive(source, message, now))  # type: ignore[arg-type]

    def _note_others(self, worker: str, load: int) -> None:
        self._control.post(lambda: self._dispatcher.note_others(worker, load))

    def _drains(self, worker: str) -> None:
        def drain() -> None:
            self._dispatcher.drain_worker(worker)
            self._leaving.add(worker)
            self._note_lacking()

        self._control.post(drain)

    def _lost(self, worker: str, reason: str) -> None:
        self._modules.lost(worker)

        def lose() -> None:
            self._leaving.discard(worker)
            self._covering.discard(worker)
            for hosts in self._hosts.values():
                hosts.discard(worker)
            self._dispatcher.lose_worker(worker, reason)
            self._note_lacking()

        self._control.post(lose)

    def _may_pass(self, source: str, message: Message) -> bool:
        """Keeps prompts that are covered for nobody from a decode worker."""
        if isinstance(message, m.Covered) and not self._dispatcher.is_current(message.sequence.id):
            self._links.send(DISPATCHER, source, m.Release(message.sequence.id))
            return False
        return True

    def _tick(self) -> None:
        now = time.monotonic()
        self._control.post(lambda: self._dispatcher.tick(now))
