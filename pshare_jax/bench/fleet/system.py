"""Routers over many engines, in virtual time: what each of them hears, and when."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pshare_jax.bench.fleet.engines import (
    DecodeEngine,
    Engine,
    EngineOptions,
    PrefillEngine,
)
from pshare_jax.bench.plan.clock import Clock
from pshare_jax.core import messages as m
from pshare_jax.core.dispatcher import Dispatcher
from pshare_jax.core.messages import Message
from pshare_jax.core.models import ModelSpec
from pshare_jax.core.requests import PromptUsage, Request, SamplingParams
from pshare_jax.core.router import Router, WorkerInfo
from pshare_jax.core.sequences import Sequence
from pshare_jax.core.split_rule import LastTokens

_IDS = 1 << 40
"""Each router's sequences have ids from a range of its own."""


@dataclass(frozen=True)
class FleetOptions:
    """Engines, and what routers hear of them.

    Args:
        prefill: prefill engines.
        decode: decode engines.
        page_size: tokens of a page.
        models: models that are asked.
        beat_seconds: between two messages of an engine about its index and its load.
        failures_per_minute: part of the engines that fails in a minute.
        down_seconds: from a failure until the engine is there again, with nothing.
        notice_seconds: until routers know of a failure, at most.
        missed: part of the changes of an index that a router misses.
        engine: what each can do.
    """

    prefill: int = 400
    decode: int = 600
    page_size: int = 64
    models: int = 4
    beat_seconds: float = 0.25
    failures_per_minute: float = 0.01
    down_seconds: float = 20.0
    notice_seconds: float = 0.65
    missed: float = 0.01
    engine: EngineOptions = field(default_factory=EngineOptions)


@dataclass
class Call:
    """A request on its way."""

    covered: int
    on_end: Callable[[], None]
    usage: PromptUsage | None = None


class TimedRouter(Router):
    """A router that notes how long it takes to decide, in processor time.

    Attributes:
        seconds: of each decision.
    """

    seconds: list[float]

    def route(self, *args: object, **kwargs: object) -> Sequence:
        """See Router."""
        start = time.thread_time()
        routed = super().route(*args, **kwargs)  # type: ignore[arg-type]
        self.seconds.append(time.thread_time() - start)
        return routed


class RoutedFleet:
    """Engines and their routers.

    Args:
        options: what there is.
        routers: how many; 0 is a single one that knows everything at once.
        seed: of failures and of when engines send their beats.

    Attributes:
        clock: virtual time.
        ended: usage of all requests that have ended.
        failures: engines that have failed.
        errors: requests that ended with an error.
    """

    def __init__(self, options: FleetOptions, routers: int, seed: int = 0):
        self.clock = Clock()
        self.ended: list[PromptUsage] = []
        self.failures = 0
        self.errors: list[str] = []
        self._options = options
        self._knows_all = routers == 0
        self._random = random.Random(seed)
        self._engines = self._build_engines()
        self._phase = {name: self._random.random() * options.beat_seconds for name in self._engines}
        self._touched: set[str] = set()
        infos = {True: [], False: []}
        for engine in self._engines.values():
            infos[engine.prefills].append(engine.info)
        hosts = tuple(info.name for info in infos[False])
        models = {str(i): _model(str(i), hosts) for i in range(options.models)}
        self._dispatchers = {}
        self._routers = []
        for i in range(max(routers, 1)):
            router = TimedRouter(infos[True], infos[False], replicas=max(routers, 1))
            router.seconds = []
            ids = itertools.count(i * _IDS)
            dispatcher = Dispatcher(models, router, options.page_size, ids=ids)
            self._dispatchers[f"router{i}"] = dispatcher
            self._routers.append(router)
        self._calls: dict[str, Call] = {}
        self._count = 0

    @property
    def num_routers(self) -> int:
        """Routers that requests may go to."""
        return len(self._routers)

    @property
    def decision_seconds(self) -> list[float]:
        """How long each decision took, in processor time."""
        return [seconds for router in self._routers for seconds in router.seconds]

    def submit(
        self,
        router: int,
        model: int,
        prompt: tuple[int, ...],
        tokens: int,
        on_end: Callable[[], None],
    ) -> None:
        """Asks a router for `tokens` tokens of a model after a prompt."""
        name, self._count = f"router{router}", self._count + 1
        request = Request(f"{self._count}", str(model), prompt, SamplingParams(max_tokens=tokens))
        self._calls[request.id] = Call(len(prompt) - 1, on_end)
        dispatcher = self._dispatchers[name]
        dispatcher.submit(request, order=self._count, seed=0, end_token_ids=frozenset())
        self._deliver(name)

    def fail_at_random(self, until: float) -> None:
        """Has engines fail from now on, up to a moment."""
        per_second = len(self._engines) * self._options.failures_per_minute / 60
        if not per_second:
            return
        moment = self.clock.now + self._random.expovariate(per_second)
        if moment < until:
            self.clock.at(moment, lambda: self._fail(until))

    def _build_engines(self) -> dict[str, Engine]:
        options, built = self._options, {}
        for kind, count, make in (
            ("prefill", options.prefill, PrefillEngine),
            ("decode", options.decode, DecodeEngine),
        ):
            for i in range(count):
                info = WorkerInfo(f"{kind}{i}", options.engine.num_pages, options.page_size)
                built[info.name] = make(info, self.clock, options.engine, self._post, self._touch)
        return built

    def _fail(self, until: float) -> None:
        engine = self._random.choice(list(self._engines.values()))
        if engine.alive:
            self.failures += 1
            engine.fail()
            for name, dispatcher in self._dispatchers.items():
                notice = self._random.random() * self._options.notice_seconds
                self.clock.at(
                    self.clock.now + (0.0 if self._knows_all else notice),
                    lambda name=name, dispatcher=dispatcher: self._lose(name, dispatcher, engine),
                )
            self.clock.at(self.clock.now + self._options.down_seconds, lambda: self._return(engine))
        self.fail_at_random(until)

    def _lose(self, name: str, dispatcher: Dispatcher, engine: Engine) -> None:
        dispatcher.lose_worker(engine.info.name, "failed")
        self._deliver(name)

    def _return(self, engine: Engine) -> None:
        engine.restart()
        for dispatcher in self._dispatchers.values():
            dispatcher.add_worker(engine.info, prefill=engine.prefills)

    def _deliver(self, name: str) -> None:
        """Carries what a dispatcher has to say."""
        dispatcher = self._dispatchers[name]
        messages, dispatcher.outbox = dispatcher.outbox, []
        for to, message in messages:
            self._post(name, to, message)
        outputs, dispatcher.outputs = dispatcher.outputs, []
        for output in outputs:
            call = self._calls[output.request_id]
            call.usage = call.usage or output.usage
            if output.finish_reason is not None:
                del self._calls[output.request_id]
                if output.error is not None:
                    self.errors.append(output.error)
                elif call.usage is not None:
                    self.ended.append(call.usage)
                call.on_end()

    def _post(self, source: str, to: str, message: Message) -> None:
        """A message is on its way; what goes to an engine that has failed is lost."""
        self.clock.at(
            self.clock.now + self._options.engine.wire_seconds,
            lambda: self._arrive(source, to, message),
        )

    def _arrive(self, source: str, to: str, message: Message) -> None:
        if to in self._dispatchers:
            if isinstance(message, m.Covered):
                # To the decode engine, which answers to the router.
                self._arrive(to, message.sequence.decode_worker, message)
                return
            self._dispatchers[to].receive(source, message)  # type: ignore[arg-type]
            self._deliver(to)
        elif self._engines[to].alive:
            self._engines[to].receive(source, message)

    def _touch(self, engine: Engine) -> None:
        """Something of an engine has changed; routers hear of it with its next beat."""
        name = engine.info.name
        if self._knows_all:
            self._tell(engine)
        elif name not in self._touched:
            self._touched.add(name)
            beat, phase = self._options.beat_seconds, self._phase[name]
            beats = int((self.clock.now - phase) // beat) + 1
            self.clock.at(phase + beats * beat, lambda: self._beat(engine))

    def _beat(self, engine: Engine) -> None:
        self._touched.discard(engine.info.name)
        if engine.alive:
            self._tell(engine)

    def _tell(self, engine: Engine) -> None:
        """Its index and its load, to all routers."""
        change, loads = engine.change(), engine.loads()
        for number, (name, dispatcher) in enumerate(self._dispatchers.items()):
            if change is not None and (self._knows_all or not self._misses()):
                dispatcher.receive(engine.info.name, change)
            if not self._knows_all:
                others = sum(load for id, load in loads.items() if id // _IDS != number)
                dispatcher.note_others(engine.info.name, others)
            self._deliver(name)

    def _misses(self) -> bool:
        return self._random.random() < self._options.missed


def _model(name: str, hosts: tuple[str, ...]) -> ModelSpec:
    return ModelSpec(name, "full", "shared", LastTokens(1), "base", "base", name, -1, hosts)
