"""Servers in virtual time: their engines, and which model is asked where."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pshare_jax.bench.plan.chains import ChainPool
from pshare_jax.bench.plan.clock import Clock, Processor
from pshare_jax.bench.plan.costs import CostModel
from pshare_jax.bench.plan.decode import DecodeSettings, SimDecode
from pshare_jax.bench.plan.prefill import SimPrefill
from pshare_jax.bench.plan.requests import SimRequest
from pshare_jax.bench.plan.router import SimRouter


@dataclass(frozen=True)
class EngineSpec:
    """One engine: what its work costs, its pages, and the processor that computes it.

    `models` are those that a decode engine hosts; empty is all of its server.
    """

    costs: CostModel
    num_pages: int
    processor: int
    models: Sequence[int] = ()


@dataclass(frozen=True)
class ServerSpec:
    """One server.

    Args:
        models: numbers of the models that are asked here.
        shared: whether they share one prefill.
        one_group: whether they decode in one batch, as LoRA modules do.
        page_size: tokens of a page.
        chunk_buckets: compiled chunk lengths.
        settings: batch sizes and limits of the decode engines.
        prefill: its prefill engines.
        decode: its decode engines.
        tail: prompt tokens that decode modules read themselves.
    """

    models: Sequence[int]
    shared: bool
    one_group: bool
    page_size: int
    chunk_buckets: Sequence[int]
    settings: DecodeSettings
    prefill: Sequence[EngineSpec]
    decode: Sequence[EngineSpec]
    tail: int = 1


@dataclass(frozen=True)
class SystemSpec:
    """Servers side by side.

    Args:
        servers: each model is asked at the one that has it.
        call_seconds: of each call outside the engines: HTTP, tokens to text, the way there.
    """

    servers: Sequence[ServerSpec]
    call_seconds: float = 0.0


class System:
    """The servers of a specification, idle, at time 0."""

    def __init__(self, spec: SystemSpec):
        self.spec = spec
        self.clock = Clock()
        processors: dict[int, Processor] = {}

        def processor(number: int) -> Processor:
            if number not in processors:
                processors[number] = Processor(self.clock)
            return processors[number]

        orders = itertools.count()
        self.servers = [_Server(self.clock, s, processor, orders) for s in spec.servers]
        self._of_model = {model: s for s in self.servers for model in s.spec.models}

    def submit(
        self, session: int, model: int, prompt: int, tokens: int, on_finish: Callable[[], None]
    ) -> SimRequest:
        """Asks a model for `tokens` tokens after a session's first `prompt` tokens."""
        return self._of_model[model].submit(session, model, prompt, tokens, on_finish)

    @property
    def prefill(self) -> list[SimPrefill]:
        """All prefill engines."""
        return [engine for server in self.servers for engine in server.prefill]

    @property
    def decode(self) -> list[SimDecode]:
        """All decode engines."""
        return [engine for server in self.servers for engine in server.decode]


@dataclass(eq=False)
class _Server:
    clock: Clock
    spec: ServerSpec
    processor: Callable[[int], Processor]
    orders: itertools.count[int]
    prefill: list[SimPrefill] = field(init=False)
    decode: list[SimDecode] = field(init=False)

    def __post_init__(self) -> None:
        spec = self.spec
        self.decode = [
            SimDecode(
                self.clock,
                self.processor(engine.processor),
                engine.costs,
                ChainPool(engine.num_pages, spec.page_size),
                spec.settings,
                self._route,
                self._notify_prefill,
            )
            for engine in spec.decode
        ]
        self.prefill = [
            SimPrefill(
                self.clock,
                self.processor(engine.processor),
                engine.costs,
                ChainPool(engine.num_pages, spec.page_size),
                spec.chunk_buckets,
                self.decode,
            )
            for engine in spec.prefill
        ]
        self._router = SimRouter(self.prefill, [engine.pool for engine in self.decode])
        self._hosts: Mapping[int, list[int]] = {
            model: [i for i, e in enumerate(spec.decode) if not e.models or model in e.models]
            for model in spec.models
        }

    def submit(
        self, session: int, model: int, prompt: int, tokens: int, on_finish: Callable[[], None]
    ) -> SimRequest:
        def finish() -> None:
            self._router.forget(request)
            on_finish()

        request = SimRequest(
            order=next(self.orders),
            model=model,
            group=0 if self.spec.one_group else model,
            chain=(session, None if self.spec.shared else model),
            prompt=prompt,
            max_tokens=tokens,
            on_finish=finish,
            tail=self.spec.tail,
        )
        self._route(request)
        return request

    def _route(self, request: SimRequest) -> None:
        self._router.route(request, self._hosts[request.model])
        self.prefill[request.prefill_engine].submit(request)

    def _notify_prefill(self) -> None:
        for engine in self.prefill:
            engine.notify()
