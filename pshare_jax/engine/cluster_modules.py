"""A frontend's side of decode modules that come and go while a cluster runs.

A module that is loaded here is loaded by the decode workers first; it is served once one of them
has it. Others learn of it by way of the workers, and workers that come later by this one.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor

from pshare_jax.cluster import wire
from pshare_jax.cluster.modules import ModuleEntry, ModuleTable
from pshare_jax.config import ModelEntry
from pshare_jax.core.models import ModelSpec
from pshare_jax.engine.served import ModelInfo, ServedModels
from pshare_jax.engine.sources import BASE, BaseSource, ModelSource, loaded_spec, model_source
from pshare_jax.errors import CheckpointError, EngineDeadError, PshareError, RequestError

logger = logging.getLogger(__name__)

LOAD_SECONDS = 300.0
"""How long decode workers may take to load a module."""

Tell = Callable[[wire.Load | wire.Retired | wire.Modules, str], None]
"""Sends a frame to the process of a worker, or to all with an empty name."""


class ClusterModules:
    """What came and went. Methods are for any thread.

    Args:
        base: the prefill module.
        served: the served models.
        tell: sends frames to workers.
        serve: has the dispatcher serve a module under a name, or nothing.
        host: has the dispatcher know which models a worker generates for, beside the configured.

    Attributes:
        heard: called with a name under which another frontend has served something.
    """

    def __init__(
        self,
        base: BaseSource,
        served: ServedModels,
        tell: Tell,
        serve: Callable[[str, ModelSpec | None], None],
        host: Callable[[str, frozenset[str]], None],
    ):
        self.heard: Callable[[str], None] = lambda name: None
        self._base = base
        self._served = served
        self._tell = tell
        self._serve = serve
        self._host = host
        self._table = ModuleTable()
        self._changing = threading.Lock()
        self._condition = threading.Condition()
        self._used: dict[str, wire.Load] = {}
        self._decoding: dict[str, wire.Hosting | None] = {}
        # Reads checkpoints' manifests, for which links must not wait.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="modules")

    def close(self) -> None:
        """Ends the thread."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def settle(self) -> None:
        """Waits until all that was heard so far is served, or this is closed."""
        with contextlib.suppress(RuntimeError, CancelledError):
            self._reader.submit(lambda: None).result()

    def load(self, served: ModelEntry, *, replace: bool) -> ModelInfo:
        """Serves a decode module at all frontends, see `ServedModels.load`. Blocks.

        Raises:
            RequestError: a name that is taken, or no decode worker has room, or none has answered.
            CheckpointError, CertificateError, ConfigError: no decode module of this base.
        """
        name = served.name
        with self._changing:
            self._served.check_name(name, replace)
            version = self._table.next_version(name)
            source = self._source(served)
            entry = ModuleEntry(
                version,
                f"{name}@{version:x}",
                served.checkpoint,
                _print(source),
                served.tool_parser,
                served.reasoning,
            )
            load = self._load_of(name, entry, source)
            self._use(load)
            try:
                self._wait_for(entry.id)
            except PshareError:
                self.retired(entry.id)
                raise
            self._publish({name: entry})
            return self._add(name, source, load.spec)

    def unload(self, name: str) -> None:
        """Takes no more requests for a module, at any frontend; see `ServedModels.unload`."""
        with self._changing:
            self._served.unload(name, lambda name: self._serve(name, None))
            self._publish({name: ModuleEntry(self._table.next_version(name))})

    def greet(self, worker: str, *, generates: bool) -> None:
        """A worker has come: it hears what may be asked of it before anything is."""
        with self._condition:
            used = list(self._used.values())
            if generates:
                self._decoding[worker] = None
        for load in used:
            self._tell(load, worker)
        # As it is now: it is encoded later, in another thread.
        self._tell(wire.Modules(dict(self._table.entries)), worker)

    def lost(self, worker: str) -> None:
        """A worker is not there any more."""
        with self._condition:
            self._decoding.pop(worker, None)
            self._condition.notify_all()

    def hear(self, frame: wire.Hosting | wire.Modules) -> None:
        """A worker says what it has, or what there is."""
        if isinstance(frame, wire.Modules):
            self._reader.submit(self._learn, frame)
            return
        with self._condition:
            if frame.worker in self._decoding:
                self._decoding[frame.worker] = frame
                self._condition.notify_all()
        self._host(frame.worker, frozenset(frame.models))

    def retired(self, id: str) -> None:
        """No request is left that uses a model, and none will come."""
        with self._condition:
            known = self._used.pop(id, None)
        if known is not None:
            self._tell(wire.Retired(id), "")

    def _source(self, served: ModelEntry) -> ModelSource:
        """What a checkpoint says of itself; its weights are not read."""
        return model_source(served, self._base, None)

    def _load_of(self, name: str, entry: ModuleEntry, source: ModelSource) -> wire.Load:
        spec = loaded_spec(source, self._base, entry.id, BASE, -1, 0)
        return wire.Load(name, entry.folder, entry.weights, spec)

    def _use(self, load: wire.Load) -> None:
        """Has workers know of a model before any sequence of it is sent."""
        with self._condition:
            self._used[load.spec.name] = load
        self._tell(load, "")

    def _wait_for(self, id: str) -> None:
        """Waits until a decode worker has a model.

        Raises:
            RequestError, CheckpointError: none will.
            EngineDeadError: none is there.
        """
        deadline = time.monotonic() + LOAD_SECONDS
        with self._condition:
            while True:
                said = [hosting for hosting in self._decoding.values() if hosting is not None]
                if any(id in hosting.models for hosting in said):
                    return
                errors = [hosting.errors[id] for hosting in said if id in hosting.errors]
                if errors and len(errors) == len(self._decoding):
                    raise _as_error(errors[0])
                if not self._decoding:
                    raise EngineDeadError("no decode worker is there that could load it")
                if not self._condition.wait(deadline - time.monotonic()):
                    raise RequestError(f"no decode worker has loaded it within {LOAD_SECONDS:g} s")

    def _publish(self, entries: dict[str, ModuleEntry]) -> None:
        self._table.merge(entries)
        self._tell(wire.Modules(entries), "")

    def _add(self, name: str, source: ModelSource, spec: ModelSpec) -> ModelInfo:
        self._served.count_as(spec.name, name)
        self._serve(name, spec)
        return self._served.add(name, source, spec)

    def _learn(self, frame: wire.Modules) -> None:
        """Serves what others serve."""
        with self._changing:
            news = self._table.merge(frame.entries)
            if news:
                # Workers that only this frontend is linked to have not heard of it.
                self._tell(wire.Modules(news), "")
            for name, entry in news.items():
                try:
                    self._follow(name, entry)
                except Exception:
                    logger.exception("module %r, which another frontend has loaded", name)

    def _follow(self, name: str, entry: ModuleEntry) -> None:
        if not entry.id:
            if name in self._served.specs:
                self._served.unload(name, lambda name: self._serve(name, None))
                logger.info("model %r is not served any more", name)
            return
        told = ModelEntry(
            name, entry.folder, tool_parser=entry.tool_parser, reasoning=entry.reasoning
        )
        source = self._source(told)
        if _print(source) != entry.weights:
            raise CheckpointError(f"{entry.folder}: another module lies there by now")
        load = self._load_of(name, entry, source)
        self._use(load)
        # Whoever serves it must know of it before anybody asks.
        self.heard(name)
        self._add(name, source, load.spec)
        logger.info("model %r is served from %s", name, entry.folder)


def _as_error(error: wire.LoadError) -> PshareError:
    if error.code == wire.INVALID:
        return CheckpointError(error.message)
    return RequestError(error.message, code=error.code or None)


def _print(source: ModelSource) -> str:
    return source.certificate.weights_fingerprint if source.certificate else ""
