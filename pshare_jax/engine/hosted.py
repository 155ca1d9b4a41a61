"""The workers of one process that hosts nothing else: one engine's side, or both on one mesh."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np

from pshare_jax.cluster.cpus import allowed_cpus, format_cpus
from pshare_jax.cluster.limits import check_cluster
from pshare_jax.cluster.thread import Send, WorkerThread
from pshare_jax.cluster.turns import HostTurns
from pshare_jax.cluster.wire import Part, Shape
from pshare_jax.cluster.worker import DecodeWorker, PrefillWorker, Worker
from pshare_jax.config import Role, ServeConfig
from pshare_jax.convert.manifest import TOKENIZER_FOLDER, read_manifest
from pshare_jax.core.messages import Message
from pshare_jax.core.models import ModelSpec
from pshare_jax.core.pages.sharing_map import PoolView, pool_views
from pshare_jax.core.router import WorkerInfo
from pshare_jax.core.stats import EngineStats
from pshare_jax.engine.assembly import Assembly
from pshare_jax.engine.devices import compute_dtype, page_dtype, prepare_jax
from pshare_jax.engine.gang import hosts_of, mirror_of, replay_of
from pshare_jax.engine.hosted_grammars import HostedGrammars
from pshare_jax.engine.hosted_modules import HostedModules
from pshare_jax.engine.hosted_pages import HostedPages
from pshare_jax.engine.kv_store import EngineStore
from pshare_jax.engine.limits import check_config
from pshare_jax.engine.loader import WeightLoader
from pshare_jax.engine.modules import Modules
from pshare_jax.engine.served import ModelInfo, ServedModels
from pshare_jax.engine.shape import cluster_shape, dtype_of_pages
from pshare_jax.engine.snapshot import worker_stats
from pshare_jax.engine.sources import BaseSource, ModelSource, checkpoint_sources, model_specs
from pshare_jax.engine.weight_format import served_model
from pshare_jax.errors import ConfigError
from pshare_jax.kernels.backends import backend_for
from pshare_jax.kv.peers import Peers
from pshare_jax.runtime.compiles import compile_count
from pshare_jax.runtime.host_memory import return_freed_memory
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.runtime.mirror import Mirror, Replay, Run
from pshare_jax.sharding.mesh import carve_one, meet, mesh_of_all_processes
from pshare_jax.text.grammar import GrammarCompiler, GrammarLimits
from pshare_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_FRONTENDS_JUDGE = GrammarLimits(compile_seconds=60.0)
"""A grammar that a frontend has taken is not refused because a worker is slower."""


class HostedWorkers:
    """Builds the workers of a process and runs them in one thread.

    Args:
        config: the serving configuration, the same in all processes.
        role: what it does; with `both` prompts are covered and answered over one pool.
        name: by which it is known; the number at its end is that of its decode engine, see
            `ModelEntry.decode_engines`.
        base: the prefill module.
        sources: the served models.
        tokenizer: the base's tokenizer.
        url: where other hosts get pages that are on offer here; empty is nowhere.
        peers: asks other worker processes.
        host: address of this process, for what it offers by `jax.experimental.transfer`.

    Attributes:
        shape: what others must agree with.
        pages: moves pages from and to other processes.
        parts: the workers, as frontends are to know them.
        thread: hosts them; None until `start`.

    Raises:
        ConfigError: a configuration that cannot be served, by key.
        CheckpointError: weights that cannot be loaded.
    """

    def __init__(
        self,
        config: ServeConfig,
        role: Role,
        name: str,
        base: BaseSource,
        sources: list[ModelSource],
        tokenizer: Tokenizer | None = None,
        url: str = "",
        peers: Peers | None = None,
        host: str = "127.0.0.1",
    ):
        self.config = config
        self.thread: WorkerThread | None = None
        self._tokenizer = tokenizer
        dtype = compute_dtype(config, base.config)
        base = dataclasses.replace(base, kv_dtype=config.kv_dtype)
        layout = PageLayout.of(base.config, config.page_size, page_dtype(config, base.config))
        sizes = check_config(config, base.config, layout)
        check_cluster(config)
        degree = (config.prefill if role == "prefill" else config.decode).tensor_parallel
        if role == "both" and config.prefill.tensor_parallel != degree:
            raise ConfigError("prefill.tensor_parallel and decode.tensor_parallel must be equal")
        hosts = hosts_of(config, role)
        if hosts > 1:
            mesh = mesh_of_all_processes(jax.devices(), degree, hosts)
            meet(mesh)
        else:
            mesh = carve_one(jax.devices(), 1, degree)[0]
        specs = _hosted_specs(config, role, name, base, sources)
        served = ServedModels(config, base, sources, specs)
        self._served = served
        self._computed = dtype.name
        pages = dtype_of_pages(np.dtype(layout.dtype).name, self._computed)
        self.shape: Shape = cluster_shape(config, base, sources, specs, pages)
        backend = backend_for(config.kernel_backend, jax.default_backend())
        loader = WeightLoader(base, sources, backend, config.decode, dtype)
        compiler: GrammarCompiler | None = None
        if tokenizer is not None and tokenizer.eos_token_ids and role != "prefill":
            compiler = GrammarCompiler(tokenizer, _FRONTENDS_JUDGE)
        self._grammars = None if compiler is None else HostedGrammars(compiler)
        assembly = Assembly(config, base.config, layout, sizes, backend, loader, specs, compiler)
        self.pages = HostedPages(config, role, layout, mesh.size, url, peers, host)
        self.prefill: list[PrefillWorker[Any]] = []
        self.decode: list[DecodeWorker[Any]] = []
        prefill_name, decode_name = _part_name("prefill", name), _part_name("decode", name)
        if role == "both":
            covers, generates = assembly.pair((prefill_name, decode_name), 0, mesh)
            self.prefill, self.decode = [covers], [generates]
        elif role == "prefill":
            self.prefill = [assembly.prefill(prefill_name, mesh, self.pages.new_end)]
        else:
            self.decode = [assembly.decode(decode_name, 0, mesh, self.pages.new_end)]
        loader.built()
        for worker in (*self.prefill, *self.decode):
            # Another process may have had the name before, and told of an index of its own.
            worker.core.index_feed.incarnation = secrets.randbits(32)
        if role == "prefill":
            for worker in self.prefill:
                worker.core.offer_unasked()
        hosted = tuple(name for name, spec in specs.items() if spec.decode_workers)
        partners = (decode_name, prefill_name) if role == "both" else ("", "")
        self.parts = [Part(_info(w, partners[0]), "prefill") for w in self.prefill]
        self.parts += [Part(_info(w, partners[1]), "decode", hosted) for w in self.decode]
        self._layout = layout
        self.modules = HostedModules(
            base,
            dtype,
            self._places(base, loader, sources, specs),
            served,
            specs,
            prefill_name if self.prefill else "",
            decode_name if self.decode else "",
            self._post,
        )
        self._one_pool = role == "both"
        self._store: EngineStore | None = None
        self._mirror: Mirror | None = None
        self._turns: HostTurns | None = None
        self._compiles_at_start = 0

    @classmethod
    def from_config(
        cls,
        config: ServeConfig,
        role: Role,
        name: str,
        url: str = "",
        peers: Peers | None = None,
        host: str = "127.0.0.1",
        *,
        leads: bool = True,
    ) -> HostedWorkers:
        """Loads the checkpoints that `config` names.

        `leads` says whether this process decides what its mesh computes; the others of a gang do as
        they are told. All else is as for the class.

        Raises:
            ConfigError: a configuration that cannot be served, by key.
            CheckpointError: a checkpoint that cannot be used, by file and tensor.
            CertificateError: a decode module that does not fit the base.
        """
        prepare_jax(_alone(config, role))
        dtype = compute_dtype(config, served_model(config, read_manifest(config.base)))
        base, sources = checkpoint_sources(config, dtype)
        tokenizer = None
        # For grammars, and to calibrate the codec of a store. Others need not wait a second for it.
        if leads and (role != "prefill" or config.kv_store.path):
            tokenizer = Tokenizer.load(Path(config.base) / TOKENIZER_FOLDER)
        return cls(config, role, name, base, sources, tokenizer, url, peers, host)

    @property
    def models(self) -> dict[str, ModelInfo]:
        """The models that were configured, by name."""
        return self._served.infos

    @property
    def workers(self) -> list[Worker]:
        """All workers."""
        return [*self.decode, *self.prefill]

    def start(self, send: Send, on_failure: Callable[[str, str], None]) -> None:
        """Compiles everything that serving runs, then starts the thread. Blocks.

        Args:
            send: carries messages to parts that are elsewhere; in the thread.
            on_failure: called with a worker's name and the reason when it has failed.

        Raises:
            ConfigError: the KV store cannot be made or used.
        """
        started = time.monotonic()
        compile_count()
        stores = bool(self.config.kv_store.path) and bool(self.prefill)
        for worker in self.decode:
            worker.executor.warm_up(receives=not self._one_pool, sends=not self._one_pool)
        for worker in self.prefill:
            moves = stores or not self._one_pool
            worker.executor.warm_up(sends=moves, receives=moves)
        self.pages.warm_up()
        if self._mirror is not None:
            self._mirror.warming = False
        self._turns = self._host_turns()

        def carry(source: str, to: str, message: Message) -> None:
            if self._grammars is not None:
                self._grammars.sent(message)
            send(source, to, self.pages.addressed(source, to, message))

        thread = WorkerThread("engine", self.workers, carry, on_failure, host_turns=self._turns)
        self.pages.listen(self.decode, thread)
        if stores:
            self._store = EngineStore(
                self.config.kv_store,
                self._layout,
                self._computed,
                self.prefill,
                self._tokenizer,
            )
            self._store.attach(thread.post)
        return_freed_memory()
        logger.info("warm-up took %.1f s", time.monotonic() - started)
        self._compiles_at_start = compile_count()
        thread.start()
        self.thread = thread

    def lead(self, send: Callable[[Run], None], compiled: Callable[[], None]) -> None:
        """Has other processes of the mesh told of each call before it is made; before `start`.

        Args:
            send: tells them, in order.
            compiled: waits until they have compiled what they were told to.
        """
        self._mirror = mirror_of(self.prefill, self.decode, send, compiled)

    def replay(self) -> Replay:
        """What makes the calls of the mesh's first process in another one, instead of `start`."""
        return replay_of(self.prefill, self.decode)

    def prepare(self, message: Message) -> Callable[[], None] | None:
        """What is to be done before a worker hears a message, beside its thread: see `Station`.

        The grammar of an answer is compiled. Pages that are on offer begin to be read.
        """
        self.pages.read_ahead(message)
        return None if self._grammars is None else self._grammars.prepare(message)

    def taken(self, message: Message) -> None:
        """A worker is about to hear a message, which has been prepared."""
        if self._grammars is not None:
            self._grammars.taken(message)

    def _places(
        self,
        base: BaseSource,
        loader: WeightLoader,
        sources: list[ModelSource],
        specs: dict[str, ModelSpec],
    ) -> Modules | None:
        """What the decode worker's weights take up, if there is one."""
        if not self.decode:
            return None
        executors = {worker.name: worker.executor for worker in self.decode}
        # The stack has all LoRA modules, hosted or not.
        here = [s for s in sources if s.kind == "lora" or specs[s.name].decode_workers]
        return Modules(base, loader, executors, self.config.decode.max_full, here, specs)

    def _post(self, to: str, message: Message) -> None:
        assert self.thread is not None
        self.thread.post(to, message)

    def stop(self) -> None:
        """Ends the thread, and takes back what is on offer."""
        self.modules.close()
        if self.thread is not None:
            self.thread.stop()
            for worker in self.workers:
                worker.release_all()
        if self._store is not None:
            self._store.close()
        self.pages.close()
        if self._turns is not None:
            self._turns.close()

    def _host_turns(self) -> HostTurns | None:
        """Turns at this machine's CPU, if that is what computes."""
        if not self.config.cluster.take_turns or jax.default_backend() != "cpu":
            return None
        # Who is kept to other CPUs computes beside this one.
        cpus = allowed_cpus()
        some = f"-cpus-{format_cpus(cpus)}" if 0 < len(cpus) < (os.cpu_count() or 1) else ""
        path = Path(self.config.cluster.shm_path) / f"pshare-turns-{os.getuid()}{some}"
        try:
            return HostTurns(path, sum(worker.share.weight for worker in self.workers))
        except OSError as error:
            logger.warning("engines of this machine will not take turns: %s", error)
            return None

    def pools(self) -> list[PoolView]:
        """What the pools hold, who computed it and who reads it now; from any thread."""
        caches = {worker.name: worker.cache for worker in (*self.prefill, *self.decode)}
        readers = {worker.name: worker.core.readers() for worker in self.decode}
        return pool_views(caches, readers, self._store.held if self._store else None)

    def stats(self) -> EngineStats:
        """What has been done since the start; of the workers' thread, or once it stands still."""
        # Asked for with each beat: then what nobody has taken for too long goes, too.
        self.pages.expire()
        busy = {} if self.thread is None else self.thread.busy_seconds
        store, tiers = self._store.stats() if self._store is not None else ({}, {})
        started, moved = self.thread is not None, self.pages.stats()
        return dataclasses.replace(
            worker_stats(self.prefill, self.decode, busy, self._served.total),
            compiles=compile_count() - self._compiles_at_start if started else 0,
            store=store,
            tiers=tiers,
            transfers=moved.transfers,
            transfer_bytes=moved.transfer_bytes,
            miscoded=moved.miscoded,
        )


def _hosted_specs(
    config: ServeConfig, role: Role, name: str, base: BaseSource, sources: list[ModelSource]
) -> dict[str, ModelSpec]:
    """All models; those that this process generates for have it, as engine 0, as decode worker."""
    specs = model_specs(base, sources, config.decode.engines)
    number = re.search(r"\d+$", name)
    engine = int(number.group()) if number else 0
    hosted = {
        source.name
        for source in sources
        if role != "prefill" and (not source.decode_engines or engine in source.decode_engines)
    }
    if role != "prefill" and not hosted:
        raise ConfigError(
            f"models: none has decode engine {engine} among its decode_engines, which is what the "
            f"name {name!r} stands for"
        )
    return {
        model: msgspec.structs.replace(spec, decode_workers=("decode0",) if model in hosted else ())
        for model, spec in specs.items()
    }


def _part_name(side: str, name: str) -> str:
    """Of a worker: names of one side begin with it, as in an engine of one process."""
    return name if name.startswith(side) else f"{side}.{name}"


def _info(worker: Worker, partner: str) -> WorkerInfo:
    return WorkerInfo(worker.name, worker.cache.num_usable, worker.cache.page_size, partner)


def _alone(config: ServeConfig, role: Role) -> ServeConfig:
    """The configuration of one worker's devices."""
    side = config.prefill if role == "prefill" else config.decode
    degree = side.tensor_parallel // hosts_of(config, role)
    decode = dataclasses.replace(config.decode, engines=1, tensor_parallel=degree)
    return dataclasses.replace(config, connector="same-mesh", decode=decode)
