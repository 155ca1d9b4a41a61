"""Servers in virtual time: the engine's cores and hosts, with executors that compute nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pshare_jax.bench.plan.clock import Clock, Processor
from pshare_jax.bench.plan.costs import CostModel
from pshare_jax.bench.plan.executors import CostDecode, CostPrefill
from pshare_jax.bench.plan.hosts import SimHost
from pshare_jax.bench.plan.specs import EngineSpec, ServerSpec, SystemSpec
from pshare_jax.bench.plan.store import SimStore, SimStoreEnd
from pshare_jax.cluster.worker import DecodeWorker, PrefillWorker, Worker
from pshare_jax.core.decode import DecodeCore
from pshare_jax.core.dispatcher import Dispatcher
from pshare_jax.core.messages import DISPATCHER, Message, Outbox
from pshare_jax.core.models import ModelSpec
from pshare_jax.core.one_pool import OnePool
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.plans import DecodePlan, PrefillPlan
from pshare_jax.core.prefetch import Prefetch
from pshare_jax.core.prefill import PrefillCore
from pshare_jax.core.requests import Owner, Request, SamplingParams, Session
from pshare_jax.core.router import Router, WorkerInfo
from pshare_jax.core.sessions import SessionPolicy
from pshare_jax.core.split_rule import LastTokens
from pshare_jax.core.store_client import StoreClient

NOBODY, NO_SESSION = Owner(), Session()

_ANY_BYTES = 1
"""Of a page that is moved; what a handoff takes is told by the costs."""


@dataclass(eq=False)
class SimCall:
    """A call of a model.

    Attributes:
        prefix: a text's number, and how many of the prompt's first tokens are of it.
        arrivals: when each generated token came.
        cached: prompt tokens whose KV was there.
        shared: of these, those that were computed for another model.
    """

    model: int
    prompt: int
    max_tokens: int
    on_finish: Callable[[], None]
    owner: Owner = NOBODY
    session: Session = NO_SESSION
    prefix: tuple[int, int] = (0, 0)
    arrivals: list[float] = field(default_factory=list)
    cached: int = 0
    shared: int = 0


class System:
    """The servers of a specification, idle, at time 0."""

    def __init__(self, spec: SystemSpec):
        self.spec = spec
        self.clock = Clock()
        processors: dict[int, Processor] = {}
        self._servers = [
            _Server(self.clock, server, f"server{i}.", processors)
            for i, server in enumerate(spec.servers)
        ]
        self._of_model = {model: s for s in self._servers for model in s.spec.models}
        hosts = [
            SimHost(self.clock, processor, workers, self._carry)
            for processor, workers in self._hosted(processors.values())
        ]
        self._host_of = {worker.name: host for host in hosts for worker in host.workers}
        self._server_of = {w.name: s for s in self._servers for w in s.workers}
        for server in self._servers:
            server.attach_store(lambda to, message: self._host_of[to].post(to, message))

    def submit(
        self,
        session: int,
        model: int,
        prompt: int,
        tokens: int,
        on_finish: Callable[[], None],
        owner: Owner = NOBODY,
        hints: Session = NO_SESSION,
        prefix: tuple[int, int] = (0, 0),
    ) -> SimCall:
        """Asks a model for `tokens` tokens after a session's first `prompt` tokens.

        Before those is a `prefix`: another text's number, and how many tokens of it.
        """
        call = SimCall(model, prompt + prefix[1], tokens, on_finish, owner, hints, prefix)
        server = self._of_model[model]
        server.submit(session, call)
        self._deliver(server)
        return call

    def give_mesh(self, worker: str) -> None:
        """Has a mesh that may do either work for a worker from now on; see `Dispatcher`."""
        server = self._server_of[worker]
        server.dispatcher.give_mesh(worker)
        self._deliver(server)

    def rest(self, worker: str) -> None:
        """Sends a worker nothing more; what it has ends there."""
        self._server_of[worker].router.set_role(worker, works=False)

    @property
    def stores(self) -> list[SimStore]:
        """KV stores of the servers that have one."""
        return [server.store for server in self._servers if server.store is not None]

    @property
    def prefill(self) -> list[PrefillWorker[CostPrefill]]:
        """All prefill workers."""
        return [worker for server in self._servers for worker in server.prefill]

    @property
    def decode(self) -> list[DecodeWorker[CostDecode]]:
        """All decode workers."""
        return [worker for server in self._servers for worker in server.decode]

    def _hosted(self, processors: Iterable[Processor]) -> Iterator[tuple[Processor, list[Worker]]]:
        """Workers by what computes for them; first those that decode, as in an engine."""
        for processor in processors:
            decode = [w for s in self._servers for w in s.decode if s.computes(w) is processor]
            prefill = [w for s in self._servers for w in s.prefill if s.computes(w) is processor]
            yield processor, [*decode, *prefill]

    def _carry(self, messages: Sequence[tuple[str, str, Message]]) -> None:
        """Carries messages of one moment: from whom, to whom, what."""
        heard: dict[int, _Server] = {}
        for source, to, message in messages:
            if to == DISPATCHER:
                server = self._server_of[source]
                server.dispatcher.receive(source, message, self.clock.now)  # type: ignore[arg-type]
                heard[id(server)] = server
            else:
                self._host_of[to].post(to, message)
        for server in heard.values():
            self._deliver(server)

    def _deliver(self, server: _Server) -> None:
        for to, message in server.deliver():
            self._host_of[to].post(to, message)


class _Server:
    """The cores of one server, and their executors."""

    def __init__(
        self, clock: Clock, spec: ServerSpec, prefix: str, processors: dict[int, Processor]
    ):
        self.spec = spec
        self._clock = clock
        self._processors: dict[str, Processor] = {}
        self._calls: dict[str, SimCall] = {}
        self._orders = itertools.count()
        self._transfers = itertools.count()
        names = [f"{prefix}decode{i}" for i in range(len(spec.decode))]
        self._models = {str(model): self._model(model, names) for model in spec.models}

        def parts(name: str, engine: EngineSpec) -> tuple[Processor, CostModel, PageCache]:
            processor = processors.setdefault(engine.processor, Processor())
            self._processors[name] = processor
            return processor, engine.costs, PageCache(engine.num_pages, spec.page_size)

        self.decode: list[DecodeWorker[CostDecode]] = []
        self.prefill: list[PrefillWorker[CostPrefill]] = []
        for i, engine in enumerate(spec.decode):
            part = parts(names[i], engine)
            if spec.either:
                self._pair(f"{prefix}prefill{i}", names[i], *part)
            else:
                self.decode.append(self._decode(self._decode_core(names[i], part[2]), *part))
        for i, engine in enumerate(spec.prefill):
            part = parts(name := f"{prefix}prefill{i}", engine)
            self.prefill.append(self._prefill(self._prefill_core(name, *part[1:]), *part))
        self.router = router = Router(
            [self._info(w, self.decode, i) for i, w in enumerate(self.prefill)],
            [self._info(w, self.prefill, i) for i, w in enumerate(self.decode)],
            spec.routing,
        )
        self.store = SimStore(clock, spec.store) if spec.store is not None else None
        prefetch = spec.store is not None and spec.store.prefetch_pages > 0
        policy = SessionPolicy(spec.reply_ahead, prefetch=prefetch)
        self.dispatcher = Dispatcher(self._models, router, spec.page_size, policy, spec.balance)

    def _pair(
        self,
        prefill: str,
        decode: str,
        processor: Processor,
        costs: CostModel,
        cache: PageCache,
    ) -> None:
        """The two workers of a mesh that may do either, over one pool."""
        cores = OnePool(
            self._prefill_core(prefill, costs, cache),
            self._decode_core(decode, cache),
            moves=self.spec.moves,
        )
        self._processors[prefill] = processor
        part = processor, costs, cache
        self.prefill.append(self._prefill(cores.prefill, *part, cores.schedule_prefill))
        self.decode.append(self._decode(cores.decode, *part, cores.schedule_decode))

    def _info(self, worker: Worker, others: Sequence[Worker], number: int) -> WorkerInfo:
        """A worker as the router sees it; of a mesh that may do either it has a twin."""
        pages, size, either = worker.cache.num_usable, worker.cache.page_size, self.spec.either
        if not either:
            return WorkerInfo(worker.name, pages, size)
        rests = (number < either) == isinstance(worker, DecodeWorker)
        return WorkerInfo(worker.name, pages, size, twin=others[number].name, rests=rests)

    def attach_store(self, send: Callable[[str, Message], None]) -> None:
        """Gives prefill workers their sides of the store; `send` carries a message to a worker."""
        if self.store is None:
            return
        engines = self.spec.decode if self.spec.either else self.spec.prefill
        for worker, engine in zip(self.prefill, engines, strict=True):
            prices = self.store.spec.prices(*_compute_prices(engine.costs, self.spec.chunk_buckets))
            client = StoreClient(worker.cache, prices, self._transfers)
            if self.store.spec.prefetch_pages:
                client.ahead = Prefetch(client, worker.cache, self.store.spec.prefetch_pages, 1)
            worker.core.store = client
            worker.executor.store = SimStoreEnd(
                self.store, lambda message, name=worker.name: send(name, message)
            )

    @property
    def workers(self) -> list[Worker]:
        return [*self.decode, *self.prefill]

    def computes(self, worker: Worker) -> Processor:
        """What computes for a worker."""
        return self._processors[worker.name]

    def submit(self, session: int, call: SimCall) -> None:
        """Gives the dispatcher a call."""
        order = next(self._orders)
        params = SamplingParams(max_tokens=call.max_tokens)
        text, length = call.prefix
        prompt = (text,) * length + (session,) * (call.prompt - length)
        request = Request(
            str(order), str(call.model), prompt, params, owner=call.owner, session=call.session
        )
        self._calls[request.id] = call
        self.dispatcher.submit(request, order=order, seed=0, end_token_ids=frozenset())

    def deliver(self) -> Outbox:
        """Tells calls what has come of them; what the dispatcher has to say to workers."""
        dispatcher = self.dispatcher
        outputs, dispatcher.outputs = dispatcher.outputs, []
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(f"the simulation has lost a call: {output.error}")
            call = self._calls[output.request_id]
            call.arrivals += [self._clock.now] * len(output.token_ids)
            if usage := output.usage:
                call.cached, call.shared = usage.cached_tokens, usage.shared_tokens
            if output.finish_reason is not None:
                del self._calls[output.request_id]
                call.on_finish()
        messages, dispatcher.outbox = dispatcher.outbox, []
        return messages

    def _model(self, model: int, decode: Sequence[str]) -> ModelSpec:
        spec, own = self.spec, "base" if self.spec.shared else f"isolated/{model}"
        hosts = zip(decode, spec.decode, strict=True)
        return ModelSpec(
            name=str(model),
            kind="lora" if spec.one_group else "full",
            sharing="shared" if spec.shared else "isolated",
            split_rule=LastTokens(spec.tail),
            prefill_weights=own,
            namespace=own,
            group="lora" if spec.one_group else str(model),
            decode_workers=tuple(n for n, e in hosts if not e.models or model in e.models),
        )

    def _prefill_core(self, name: str, costs: CostModel, cache: PageCache) -> PrefillCore:
        return PrefillCore(name, cache, self._models, self.spec.chunk_buckets, pads=costs.padded)

    def _decode_core(self, name: str, cache: PageCache) -> DecodeCore:
        return DecodeCore(
            name,
            cache,
            self._models,
            self.spec.settings,
            _ANY_BYTES,
            owns_cache=not self.spec.either,
            transfer_ids=self._transfers,
        )

    def _prefill(
        self,
        core: PrefillCore,
        processor: Processor,
        costs: CostModel,
        cache: PageCache,
        schedule: Callable[[float], PrefillPlan | None] | None = None,
    ) -> PrefillWorker[CostPrefill]:
        return PrefillWorker(core, CostPrefill(processor, costs, cache), schedule)

    def _decode(
        self,
        core: DecodeCore,
        processor: Processor,
        costs: CostModel,
        cache: PageCache,
        schedule: Callable[[float], DecodePlan | None] | None = None,
    ) -> DecodeWorker[CostDecode]:
        return DecodeWorker(core, CostDecode(processor, costs, cache), schedule)


def _compute_prices(costs: CostModel, chunk_buckets: Sequence[int]) -> tuple[float, float]:
    """Seconds to compute a token, and to attend for half of a square of positions."""
    size, far = max(chunk_buckets), 4096
    near = costs.chunk(size, size, 0)
    pair = max(costs.chunk(size, size, far) - near, 0.0) / (2 * far * size)
    return (near - pair * size * size) / size, pair
