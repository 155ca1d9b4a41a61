"""A worker process's side of decode modules that come and go while a cluster runs.

A module stays as long as it is served under a name, or any linked frontend may still send sequences
of it. Those that cover prompts need to know of it; those that generate load its weights, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import msgspec

from pshare_jax.cluster import wire
from pshare_jax.cluster.modules import ModuleEntry, ModuleTable
from pshare_jax.config import ModelEntry
from pshare_jax.core import messages as m
from pshare_jax.core.models import ModelSpec
from pshare_jax.engine.gil import handing_on
from pshare_jax.engine.modules import Modules
from pshare_jax.engine.served import ServedModels
from pshare_jax.engine.sources import BaseSource, model_source
from pshare_jax.errors import CheckpointError, ConfigError, PshareError, RequestError

logger = logging.getLogger(__name__)


class HostedModules:
    """Belongs to one event loop; weights are loaded in a thread of its own.

    Args:
        base: the prefill module.
        dtype: that weights are loaded in.
        modules: the decode worker's weights; None where there is no decode worker.
        served: the served models.
        specs: the configured models, by name.
        prefill: name of the worker that covers prompts, or nothing.
        decode: name of the worker that generates, or nothing.
        post: carries a message to a worker here.

    Attributes:
        broadcast: sends a frame to all frontends.
    """

    def __init__(
        self,
        base: BaseSource,
        dtype: object,
        modules: Modules | None,
        served: ServedModels,
        specs: Mapping[str, ModelSpec],
        prefill: str,
        decode: str,
        post: Callable[[str, m.Message], None],
    ):
        self.broadcast: Callable[[wire.Frame], None] = lambda frame: None
        self._base = base
        self._dtype = dtype
        self._modules = modules
        self._served = served
        self._prefill, self._decode = prefill, decode
        self._post = post
        self._table = ModuleTable()
        self._covered = {spec.name for spec in specs.values()} if prefill else set()
        self._hosted = {spec.name for spec in specs.values() if spec.decode_workers}
        self._known: dict[str, ModelSpec] = {}
        self._errors: dict[str, wire.LoadError] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._users: dict[str, set[int]] = {}
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="modules")

    def close(self) -> None:
        """Ends the thread; what is being loaded is loaded to its end, and lost."""
        self._loader.shutdown(wait=False, cancel_futures=True)

    @property
    def entries(self) -> Mapping[str, ModuleEntry]:
        """What has come and gone, by name."""
        return self._table.entries

    def hosting(self) -> Iterable[wire.Frame]:
        """What of that is hosted here."""
        if self._modules is not None:
            yield wire.Hosting(self._decode, list(self._known), dict(self._errors))

    def hear(self, frontend: int, frame: wire.Load | wire.Retired | wire.Modules) -> None:
        """Takes in what a frontend says, by its incarnation."""
        match frame:
            case wire.Load(spec=spec):
                self._users.setdefault(spec.name, set()).add(frontend)
                self._load(frame)
            case wire.Retired(id):
                self._users.get(id, set()).discard(frontend)
            case wire.Modules(entries):
                news = self._table.merge(entries)
                if news:
                    self.broadcast(wire.Modules(news))
        self._sweep()

    def leave(self, frontend: int) -> None:
        """A frontend is not linked any more, and nothing that it had sent is left."""
        for users in self._users.values():
            users.discard(frontend)
        self._sweep()

    def lacks(self, message: m.Message, to: str) -> str:
        """The model that a sequence needs and a worker does not have, or nothing."""
        if isinstance(message, m.Prefill) and to == self._prefill:
            known = self._covered
        elif isinstance(message, m.Covered) and to == self._decode:
            known = self._hosted
        else:
            return ""
        return "" if message.sequence.model in known else message.sequence.model

    def _load(self, load: wire.Load) -> None:
        spec = load.spec
        if spec.name in self._known or spec.name in self._loading:
            return
        self._served.count_as(spec.name, load.name)
        if self._prefill:
            # The prompt's side needs no weights of it.
            self._covered.add(spec.name)
            self._post(self._prefill, m.ModelAdded(spec))
        if self._modules is None:
            self._known[spec.name] = spec
            return
        self._errors.pop(spec.name, None)
        self._loading[spec.name] = asyncio.create_task(self._bring(load, self._modules))

    async def _bring(self, load: wire.Load, modules: Modules) -> None:
        id, loop = load.spec.name, asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._loader, self._read, load, modules)
        except PshareError as error:
            logger.warning("module %r from %s: %s", load.name, load.folder, error)
            self._errors[id] = _as_frame(error)
        except Exception as error:
            logger.exception("module %r from %s", load.name, load.folder)
            self._errors[id] = wire.LoadError(f"{type(error).__name__}: {error}")
        else:
            self._known[id] = found
            self._hosted.add(id)
            self._post(self._decode, m.ModelAdded(msgspec.structs.replace(found, name=id)))
        del self._loading[id]
        self._say()
        self._sweep()

    def _read(self, load: wire.Load, modules: Modules) -> ModelSpec:
        """Loads a module's weights; how it is known here. In the loader's thread."""
        with handing_on():
            source = model_source(ModelEntry(load.name, load.folder), self._base, self._dtype)
            certificate = source.certificate
            if (certificate.weights_fingerprint if certificate else "") != load.weights:
                raise CheckpointError(f"{load.folder}: another module lies there by now")
            return modules.load(load.name, source, anew=False)

    def _sweep(self) -> None:
        """Lets modules go that nobody will ask for."""
        gone = [
            id
            for id in (*self._known, *self._errors)
            if not self._users.get(id) and not self._table.holds(id)
        ]
        for id in gone:
            self._errors.pop(id, None)
            self._users.pop(id, None)
            spec = self._known.pop(id, None)
            self._covered.discard(id)
            self._hosted.discard(id)
            for worker in (self._prefill, self._decode):
                if worker:
                    self._post(worker, m.ModelRemoved(id))
            group = self._modules.free(spec) if self._modules and spec else None
            if group is not None:
                self._post(self._decode, m.WeightsFreed(group))
        if gone:
            self._say()

    def _say(self) -> None:
        for frame in self.hosting():
            self.broadcast(frame)


def _as_frame(error: PshareError) -> wire.LoadError:
    if isinstance(error, RequestError):
        return wire.LoadError(str(error), error.code or "")
    invalid = isinstance(error, CheckpointError | ConfigError)
    return wire.LoadError(str(error), wire.INVALID if invalid else "")
