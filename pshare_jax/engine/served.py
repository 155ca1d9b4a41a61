"""Which models are served, and how that changes while the engine runs."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pshare_jax.config import ModelEntry, Reasoning, ServeConfig, Sharing
from pshare_jax.core.dispatcher import Dispatcher
from pshare_jax.core.messages import WeightsFreed
from pshare_jax.core.models import ModelKind, ModelSpec
from pshare_jax.engine.devices import compute_dtype
from pshare_jax.engine.gil import handing_on
from pshare_jax.engine.modules import Modules
from pshare_jax.engine.sources import BaseSource, ModelSource, model_source
from pshare_jax.errors import RequestError, UnknownModelError

MAX_NAME_CHARS = 256

K = TypeVar("K")


@dataclass(frozen=True)
class ModelInfo:
    """A served model as clients see it; `tail` is the split rule as its certificate states it,
    `created` is in Unix seconds, `tokenizer_folder` has its own template and end tokens,
    `fingerprint` names its weights, and the KV that it reads, and `tool_parser` and `reasoning` are
    those of `ModelEntry`."""

    name: str
    parent: str
    sharing: Sharing
    kind: ModelKind
    tail: int | dict[str, Any]
    created: int
    tokenizer_folder: Path | None
    fingerprint: str
    tool_parser: str
    reasoning: Reasoning


class ServedModels:
    """The served models by name.

    Args:
        config: the serving configuration.
        base: the prefill module.
        sources: the models that are served from the start.
        specs: the same as the engine knows them.
    """

    def __init__(
        self,
        config: ServeConfig,
        base: BaseSource,
        sources: Sequence[ModelSource],
        specs: Mapping[str, ModelSpec],
    ):
        self._config = config
        self._base = base
        self.specs = dict(specs)
        self.infos = {source.name: self._info(source.name, source) for source in sources}
        self._names = {spec.name: name for name, spec in specs.items()}
        self._loading = threading.Lock()

    def total(self, counters: Iterable[Mapping[K, int]]) -> dict[K, int]:
        """Counters of the cores, added up; models are named as clients name them.

        Keys are a model's id, or tuples that begin with one.
        """
        total: Counter[Any] = Counter()
        for counter in counters:
            for key, count in dict(counter).items():
                if isinstance(key, tuple):
                    total[self._names[key[0]], *key[1:]] += count
                else:
                    total[self._names[key]] += count  # type: ignore[index]
        return dict(total)

    def load(
        self,
        name: str,
        folder: str | Path | ModelSource,
        modules: Modules,
        tell: Callable[[str, ModelSpec], None],
        *,
        replace: bool,
        tool_parser: str | None = None,
        reasoning: Reasoning | None = None,
    ) -> ModelInfo:
        """Serves the decode module in a folder under `name`. Blocks while it is loaded.

        Args:
            name: what clients will ask for.
            folder: a checkpoint of a decode module that shares the base's KV.
            modules: takes its weights up.
            tell: has the dispatcher know of it; called before clients can ask for it.
            replace: whether it takes the place of a module of that name; requests that run go on
                with what they had.
            tool_parser: see `entry`.
            reasoning: see `entry`.

        Raises:
            RequestError: a name that is taken, or no room; see `Modules.load`.
            CheckpointError, CertificateError, ConfigError: no decode module of this base.
        """
        with self._loading, handing_on():
            self.check_name(name, replace)
            source = folder
            if not isinstance(source, ModelSource):
                dtype = compute_dtype(self._config, self._base.config)
                entry = self.entry(name, str(folder), tool_parser, reasoning)
                source = model_source(entry, self._base, dtype, gentle=True)
            spec = modules.load(name, source, anew=replace)
            self.count_as(spec.name, name)
            tell(name, spec)
            return self.add(name, source, spec)

    def entry(
        self, name: str, folder: str, tool_parser: str | None, reasoning: Reasoning | None
    ) -> ModelEntry:
        """A module in a folder that is to be served under `name`.

        Args:
            name: what clients ask for.
            folder: its checkpoint.
            tool_parser: see `ModelEntry`; None: as what has the name now, or as configured for it.
            reasoning: likewise.
        """
        configured = {entry.name: entry for entry in self._config.models}
        before = self.infos.get(name) or configured.get(name) or ModelEntry(name)
        return ModelEntry(
            name,
            folder,
            tool_parser=tool_parser or before.tool_parser,
            reasoning=reasoning or before.reasoning,
        )

    def add(self, name: str, source: ModelSource, spec: ModelSpec) -> ModelInfo:
        """Has clients ask for a module under `name` from now on."""
        self.count_as(spec.name, name)
        self.specs = {**self.specs, name: spec}
        self.infos = {**self.infos, name: self._info(name, source)}
        return self.infos[name]

    def count_as(self, id: str, name: str) -> None:
        """Has counters of a model be known by the name that clients ask for."""
        self._names = {**self._names, id: name}

    def unload(self, name: str, tell: Callable[[str], None]) -> None:
        """Takes no more requests for a decode module; those that run end with it.

        Args:
            name: of a full or LoRA module that shares the base's KV.
            tell: has the dispatcher know.

        Raises:
            UnknownModelError: there is none of that name.
            RequestError: it is the base, or isolated.
        """
        with self._loading:
            if name not in self.specs:
                raise UnknownModelError(f"model {name!r} is not served", "lora_name")
            self._check_loadable(name)
            self.specs = {n: spec for n, spec in self.specs.items() if n != name}
            self.infos = {n: info for n, info in self.infos.items() if n != name}
            tell(name)

    def check_name(self, name: str, replace: bool) -> None:
        """Checks that a module may be served under `name`.

        Raises:
            RequestError: it is no name, or taken.
        """
        if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
            raise RequestError(
                f"a model's name has 1 to {MAX_NAME_CHARS} printable characters", "lora_name"
            )
        if name in self.specs and not replace:
            raise RequestError(
                f"model {name!r} is served already; load_inplace: true loads it anew", "lora_name"
            )
        if name in self.specs:
            self._check_loadable(name)

    def _check_loadable(self, name: str) -> None:
        spec = self.specs[name]
        if spec.kind == "identity" or spec.sharing == "isolated":
            what = "the base's own weights" if spec.kind == "identity" else "isolated"
            raise RequestError(
                f"model {name!r} is {what}: only decode modules that share the base's KV come and "
                "go while the server runs",
                "lora_name",
            )

    def _info(self, name: str, source: ModelSource) -> ModelInfo:
        own = source.certificate.weights_fingerprint if source.certificate else ""
        return ModelInfo(
            name,
            Path(self._config.base).name,
            source.sharing,
            source.kind,
            source.split_rule.to_json(),
            int(time.time()),
            source.tokenizer_folder,
            f"{self._base.kv_name} {own}",
            source.tool_parser,
            source.reasoning,
        )


def free_retired(
    dispatcher: Dispatcher, modules: Modules, post: Callable[[str, WeightsFreed], None]
) -> None:
    """Frees what models had of which no request is left; in the dispatcher's thread.

    `post` carries a message to a worker.
    """
    while dispatcher.retired:
        group = modules.free(dispatcher.retired.pop())
        if group is not None:
            for worker in modules.workers:
                post(worker, WeightsFreed(group))
