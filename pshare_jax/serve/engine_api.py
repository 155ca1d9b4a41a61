"""The engine as the server sees it; `engine.orchestrator.Orchestrator` is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from pshare_jax.config import Reasoning, ServeConfig
from pshare_jax.core.pages.sharing_map import SharingMap
from pshare_jax.core.requests import Request, RequestOutput
from pshare_jax.core.stats import EngineStats
from pshare_jax.models.config import ModelConfig
from pshare_jax.text.grammar import GrammarCompiler
from pshare_jax.text.tokenizer import Tokenizer

Sink = Callable[[RequestOutput], None]


class ModelInfo(Protocol):
    """One served decode module."""

    @property
    def name(self) -> str:
        """What clients ask for."""
        ...

    @property
    def parent(self) -> str:
        """Name of the base."""
        ...

    @property
    def sharing(self) -> str:
        """`shared` or `isolated`."""
        ...

    @property
    def kind(self) -> str:
        """`identity`, `full` or `lora`."""
        ...

    @property
    def tool_parser(self) -> str:
        """The form in which it writes calls, see `ModelEntry`."""
        ...

    @property
    def reasoning(self) -> Reasoning:
        """Whether its thoughts are split off, see `ModelEntry`."""
        ...

    @property
    def tail(self) -> int | dict[str, Any]:
        """What of a prompt the decode module reads itself, as its certificate states it."""
        ...

    @property
    def created(self) -> int:
        """Unix seconds."""
        ...

    @property
    def fingerprint(self) -> str:
        """Names its weights, and the KV that it reads, the same wherever they are served."""
        ...


class Submitter(Protocol):
    """Takes sequences. Both methods return at once."""

    def submit(self, request: Request, sink: Sink) -> None:
        """Starts a sequence; `sink` gets its events, in order, from engine threads.

        Raises:
            RequestError: it can never be served.
            UnknownModelError: its model is not served.
            QueueFullError: not now.
            EngineDeadError: not any more.
        """
        ...

    def abort(self, request_id: str, *, complete: bool = False) -> None:
        """Ends a sequence; unknown and ended ones are ignored.

        A reply that is `complete` was cut where it was to end.
        """
        ...


class Engine(Submitter, Protocol):
    """The orchestrator.

    Attributes:
        heard: called with a name under which another process has a module served here; from any
            thread, before anybody can ask for it, and again when it is known.
    """

    heard: Callable[[str], None]

    @property
    def config(self) -> ServeConfig:
        """What it was built from."""
        ...

    @property
    def model_config(self) -> ModelConfig:
        """Shape of the base and of all decode modules."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer."""
        ...

    def tokenizer_of(self, model: str) -> Tokenizer:
        """The same with a model's own chat template and end tokens, where it has some."""
        ...

    @property
    def grammars(self) -> GrammarCompiler | None:
        """Compiles grammars; None without an end token."""
        ...

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        """The served decode modules by name."""
        ...

    @property
    def ready(self) -> bool:
        """Whether everything is compiled and the threads run."""
        ...

    @property
    def lacking(self) -> str:
        """What no worker does at present, such as `cover prompts`; empty if nothing. Requests are
        taken, and wait."""
        ...

    @property
    def dead(self) -> str | None:
        """Why nothing can be served any more, if so."""
        ...

    @property
    def failed_workers(self) -> Mapping[str, str]:
        """Workers that have failed, and why; others may go on."""
        ...

    def start(self) -> None:
        """Compiles everything and starts the threads; returns when ready."""
        ...

    def load_module(
        self,
        name: str,
        folder: Path,
        *,
        replace: bool = False,
        tool_parser: str | None = None,
        reasoning: Reasoning | None = None,
    ) -> ModelInfo:
        """Serves one more decode module; blocks until it does. `tool_parser` and `reasoning` are
        as before under that name, or as configured for it, where they are None.

        Raises:
            RequestError: the name is taken, or there is no room.
            CheckpointError, ConfigError: no decode module of this base.
            EngineDeadError: the engine does not run.
        """
        ...

    def unload_module(self, name: str) -> None:
        """Takes no more requests for a decode module.

        Raises:
            UnknownModelError: no model of that name.
            RequestError: it must stay.
            EngineDeadError: the engine does not run.
        """
        ...

    def stop(self) -> None:
        """Ends the threads; sequences that still run get an ERROR event."""
        ...

    def stats(self) -> EngineStats:
        """A snapshot; cheap."""
        ...

    def sharing_map(self) -> SharingMap:
        """Who computed and who reads the pages of the pools now; some milliseconds of work."""
        ...
