"""The front of an engine: takes requests and keeps account of the living, whoever hosts workers."""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pshare_jax.cluster.dispatcher_thread import DispatcherThread
from pshare_jax.config import DecodeConfig, ServeConfig
from pshare_jax.core.constraints import GrammarSpec
from pshare_jax.core.dispatcher import Dispatcher
from pshare_jax.core.messages import DISPATCHER, Message
from pshare_jax.core.prompt_scores import PromptScorer, is_scored
from pshare_jax.core.requests import Request, RequestOutput
from pshare_jax.engine.checks import check_request
from pshare_jax.engine.queue_room import QueueRoom
from pshare_jax.engine.served import ModelInfo, ServedModels
from pshare_jax.errors import (
    EngineDeadError,
    PshareError,
    QueueFullError,
    RequestError,
    UnknownModelError,
)
from pshare_jax.models.config import ModelConfig
from pshare_jax.text.grammar import GrammarCompiler
from pshare_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Sink = Callable[[RequestOutput], None]


@dataclass(frozen=True)
class _Live:
    model: str
    sink: Sink
    grammar: GrammarSpec | None


class Front(ABC):
    """What an engine is for those who ask: `submit` and `abort`, from any thread.

    Who inherits builds `_dispatcher` and `_scorer` with `_dispatch_with`.

    Args:
        config: the serving configuration.
        model_config: architecture of the base.
        tokenizer: the base's tokenizer.
        served: the served models.
        order: arrival order of the next request; grows.

    Attributes:
        ready: whether requests are taken.
        lacking: what no worker does at present, such as `cover prompts`, so that requests wait for
            one to come; empty if nothing.
        heard: called with a name under which another process has a module served here; from any
            thread, before anybody can ask for it.
    """

    def __init__(
        self,
        config: ServeConfig,
        model_config: ModelConfig,
        tokenizer: Tokenizer | None,
        served: ServedModels,
        order: Iterator[int],
    ):
        self.config = config
        self.model_config = model_config
        self.ready = False
        self.lacking = ""
        self.heard: Callable[[str], None] = lambda name: None
        self.grammars: GrammarCompiler | None = None
        if tokenizer is not None and tokenizer.eos_token_ids:
            self.grammars = GrammarCompiler(tokenizer, trial=True)
        self._tokenizer = tokenizer
        self._tokenizers: dict[str, tuple[ModelInfo, Tokenizer]] = {}
        self._served = served
        self._order = order
        self._failed: dict[str, str] = {}
        self._live: dict[str, _Live] = {}
        self._lock = threading.Lock()
        self._room = QueueRoom(config.max_queue)
        self._control = DispatcherThread(self._deliver, self._dispatcher_failed)

    def _dispatch_with(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._scorer = PromptScorer(
            dispatcher, _max_probes(self.config.decode), lambda: next(self._order)
        )

    @abstractmethod
    def _post(self, to: str, message: Message) -> None:
        """Carries a message of the dispatcher to a worker; in the dispatcher's thread."""

    @abstractmethod
    def _free_retired(self) -> None:
        """Frees what models had of which no request is left; in the dispatcher's thread."""

    @abstractmethod
    def _is_served(self, model: str) -> bool:
        """Whether there are workers left that can cover prompts and generate for a model."""

    @abstractmethod
    def _running(self) -> Counter[str]:
        """Sequences that have a slot, by model."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer.

        Raises:
            RuntimeError: the engine was built without one.
        """
        if self._tokenizer is None:
            raise RuntimeError("this engine was built without a tokenizer")
        return self._tokenizer

    def tokenizer_of(self, model: str) -> Tokenizer:
        """The base's tokenizer with a model's own chat template and end tokens.

        Raises:
            RuntimeError: the engine was built without one.
        """
        info = self._served.infos.get(model)
        folder = info.tokenizer_folder if info else None
        if folder is None or info is None:
            return self.tokenizer
        of, tokenizer = self._tokenizers.get(model, (None, None))
        # A module that is loaded anew may have others.
        if tokenizer is None or of is not info:
            tokenizer = self.tokenizer.of_module(folder)
            self._tokenizers[model] = info, tokenizer
        return tokenizer

    @property
    def models(self) -> dict[str, ModelInfo]:
        """The served models by name."""
        return self._served.infos

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
            ends |= set(self.tokenizer_of(request.model).eos_token_ids)
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

    def _why(self) -> str:
        return "; ".join(f"{name}: {why}" for name, why in self._failed.items())

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

    def _deliver(self) -> None:
        """Carries what the dispatcher has to say; in its thread."""
        dispatcher = self._dispatcher
        while dispatcher.outbox or dispatcher.outputs or dispatcher.retired:
            messages, dispatcher.outbox = dispatcher.outbox, []
            outputs, dispatcher.outputs = dispatcher.outputs, []
            for to, message in messages:
                self._post(to, message)
            self._free_retired()
            for output in outputs:
                for heard in self._scorer.take(output):
                    self._emit(heard)

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

    def _dispatcher_failed(self, reason: str) -> None:
        self._failed[DISPATCHER] = reason
        self._fail_all(f"the engine has failed: {reason}")


def _max_probes(decode: DecodeConfig) -> int:
    """Probes at a time: half of what the decode workers batch, so that others find room."""
    return max(min(decode.max_num_seqs, max(decode.batch_buckets)) // 2, 1) * decode.engines
