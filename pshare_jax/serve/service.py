"""What all handlers share: the engine, its limits, and whether requests are taken."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Literal

from aiohttp import web

from pshare_jax.core.requests import Request
from pshare_jax.errors import EngineDeadError, UnknownModelError
from pshare_jax.frontend.model_format import ModelFormat, ModelFormats
from pshare_jax.frontend.params import Limits, SamplingDefaults, sampling_defaults
from pshare_jax.serve.access import Access
from pshare_jax.serve.engine_api import Engine, ModelInfo
from pshare_jax.serve.errors import ApiError, GenerationError
from pshare_jax.serve.events import EventBridge, Generation
from pshare_jax.serve.info_metrics import EngineInfo
from pshare_jax.serve.live import Live
from pshare_jax.serve.loop_lag import LoopLag
from pshare_jax.serve.metrics import Metrics
from pshare_jax.serve.offload import Offload
from pshare_jax.serve.session_log import SessionLog
from pshare_jax.serve.templates import TemplateLosses
from pshare_jax.serve.tracing import tracing_of
from pshare_jax.text.grammar import GrammarLimits
from pshare_jax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# What one process says about ignored fields; clients choose their names, so it must end somewhere.
_MAX_LOGGED_WARNINGS = 1000


class Service:
    """One running server's state. Belongs to one event loop."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.config = engine.config.server
        self.tokenizer = engine.tokenizer
        self.limits = Limits(
            engine.model_config.vocab_size,
            engine.config.max_model_len,
            self.config.max_n,
            self.config.max_prompts,
            self.config.max_scored_tokens,
        )
        self.grammar_limits = GrammarLimits() if engine.grammars is None else engine.grammars.limits
        self.sampling_defaults = SamplingDefaults()
        if self.config.generation_config == "auto":
            self.sampling_defaults = sampling_defaults(self.tokenizer.generation_config)
        if self.sampling_defaults != SamplingDefaults():
            log.info("defaults of the base's generation_config.json: %s", self.sampling_defaults)
        self.offload = Offload(self.config.worker_threads)
        self.tracing = tracing_of(self.config)
        self.aliases = {
            alias: entry.name for entry in engine.config.models for alias in entry.aliases
        }
        self._formats = ModelFormats(lambda name: engine.tokenizer_of(name).chat_template)
        for name in engine.models:
            # A parser that is not there is refused before anybody asks.
            self.format_of(name)
        self.access = Access(self.config)
        self.metrics = Metrics(engine.models, engine.stats, self.access)
        self.metrics.register(EngineInfo(engine))
        self.templates = TemplateLosses(engine)
        self.metrics.register(self.templates)
        engine.heard = self._heard
        self.sessions = SessionLog()
        self.live = Live(engine, self.offload, self.sessions)
        self.draining = False
        self.resumable = bool(engine.config.cluster.workers)
        self._loop_lag = LoopLag(self.metrics)
        self._warned: set[str] = set()
        self._bridge = EventBridge(asyncio.get_running_loop())
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def _heard(self, name: str) -> None:
        """Another frontend of a cluster has something served under `name`."""
        self.metrics.add_model(name)

    @property
    def max_sequences(self) -> int:
        """More sequences than the engine can hold could never be admitted together."""
        decode = self.engine.config.decode
        return self.engine.config.max_queue + decode.engines * decode.max_num_seqs

    @property
    def state(self) -> Literal["ok", "warming_up", "draining", "dead"]:
        """`ok`, `warming_up`, `draining` or `dead`."""
        if self.engine.dead is not None:
            return "dead"
        if self.draining:
            return "draining"
        return "ok" if self.engine.ready else "warming_up"

    def require_serving(self) -> None:
        """Raises ApiError (503) or EngineDeadError while requests are not taken."""
        match self.state:
            case "ok":
                return
            case "dead":
                raise EngineDeadError(f"the engine has failed: {self.engine.dead}")
            case "draining":
                raise _shutting_down()
            case "warming_up":
                raise ApiError(
                    503,
                    "the server is still compiling; ask /ready",
                    code="warming_up",
                    headers={"Retry-After": "5"},
                )

    def failure(self, reason: str | None) -> Exception:
        """What to raise for a sequence that the engine ended with `reason`."""
        if self.engine.dead is not None:
            return EngineDeadError(f"the engine has failed: {self.engine.dead}")
        if self.draining:
            return _shutting_down()
        return GenerationError(reason or "the engine has ended the request")

    def canonical(self, name: str) -> str:
        """The name of the model that `name` may be an alias of."""
        return self.aliases.get(name, name)

    def served_name(self, name: str) -> str:
        """The name of the served model that `name` may be an alias of.

        Raises:
            UnknownModelError: there is none.
        """
        self.model(name)
        return self.canonical(name)

    def model(self, name: str) -> ModelInfo:
        """The served model of that name, or that alias.

        Raises:
            UnknownModelError: there is none.
        """
        found = self.engine.models.get(self.canonical(name))
        if found is None:
            served = ", ".join(self.engine.models)
            raise UnknownModelError(f"The model {name[:100]!r} does not exist; served: {served}")
        return found

    def tokenizer_of(self, name: str) -> Tokenizer:
        """The base's tokenizer with a model's own chat template and end tokens.

        Raises:
            UnknownModelError: there is no such model.
        """
        return self.engine.tokenizer_of(self.model(name).name)

    def format_of(self, name: str | None) -> ModelFormat:
        """The format of a model; of the first one if none is named.

        Raises:
            UnknownModelError: there is no such model.
        """
        return self._formats.of(
            self.model(next(iter(self.engine.models)) if name is None else name)
        )

    def warn_once(self, warning: str) -> None:
        """Logs `warning` unless this process has said it before."""
        if warning not in self._warned and len(self._warned) < _MAX_LOGGED_WARNINGS:
            self._warned.add(warning)
            log.warning("%s", warning)

    def close(self) -> None:
        """Ends the threads and timers of its own; the engine is not its own."""
        self.live.close()
        self._loop_lag.close()
        self.offload.close()

    @asynccontextmanager
    async def generation(self, requests: Sequence[Request]) -> AsyncGenerator[Generation]:
        """Runs the sequences of one HTTP request; leaving aborts what still runs."""
        self.require_serving()
        self._active += 1
        self._idle.clear()
        try:
            async with Generation(self.engine, self._bridge, requests) as generation:
                yield generation
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()

    async def drain(self, seconds: float) -> bool:
        """Takes no more requests and waits for the running ones; whether all ended in time."""
        self.draining = True
        self.live.close()
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


def _shutting_down() -> ApiError:
    message = "the server is shutting down"
    return ApiError(503, message, code="shutting_down", headers={"Retry-After": "1"})


SERVICE = web.AppKey("service", Service)
REQUEST_ID = web.RequestKey("request_id", str)
WARNINGS = web.RequestKey("warnings", str)
