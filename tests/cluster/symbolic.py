"""A cluster whose workers compute digests: real threads and links over 127.0.0.1, and no jax.

Whatever is read that should not be, changes what is generated; see `tests/core/symbolic.py`.
"""

from __future__ import annotations

import itertools
import queue
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import msgspec
from aiohttp import web

from pshare_jax.cluster import wire
from pshare_jax.cluster.station import Station
from pshare_jax.cluster.thread import WorkerThread
from pshare_jax.cluster.worker import DecodeWorker, PrefillWorker, Worker
from pshare_jax.config import ClusterConfig, DecodeConfig, ModelEntry, ServeConfig
from pshare_jax.core import messages as m
from pshare_jax.core.decode import DecodeCore
from pshare_jax.core.models import ModelSpec
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.pages.prefix_index import root_key
from pshare_jax.core.pages.sharing_map import PoolView, pool_views
from pshare_jax.core.plans import DecodePlan, Landed, PrefillPlan, PrefillResult
from pshare_jax.core.prefill import PrefillCore
from pshare_jax.core.requests import (
    FinishReason,
    PromptUsage,
    Request,
    RequestOutput,
    SamplingParams,
)
from pshare_jax.core.router import WorkerInfo
from pshare_jax.core.stats import EngineStats
from pshare_jax.engine.cluster import ClusterEngine
from pshare_jax.engine.shape import cluster_shape
from pshare_jax.engine.snapshot import worker_stats
from pshare_jax.engine.sources import BaseSource, ModelSource, model_specs
from pshare_jax.models.split import Certificate
from tests.cluster.harness import Loop, end_server
from tests.core.symbolic import (
    Link,
    SymbolicConnector,
    SymbolicDecode,
    SymbolicPool,
    SymbolicPrefill,
    module,
    oracle,
    prefill_writer,
)
from tests.engine.harness import wait_until
from tests.helpers import tiny_config

PAGE, PAGES = 4, 60
BUCKETS = (4, 8)
PACE = 0.0005
"""Seconds that a piece of work takes."""


def no_weights(shardings: Any) -> Any:
    raise AssertionError("frontends load no weights")


def sources() -> tuple[BaseSource, list[ModelSource]]:
    """The base itself, and two full modules that read its KV, with tails 1 and 3."""
    base = BaseSource(tiny_config(), "base-print", no_weights)
    found = [ModelSource("identity", "identity", "shared", no_weights)]
    for name, tail in (("full", 1), ("tail3", 3)):
        certificate = Certificate("base-print", tail, "full", True, f"print of {name}")
        found.append(ModelSource(name, "full", "shared", no_weights, certificate))
    return base, found


BASE, SOURCES = sources()
NAMES = tuple(source.name for source in SOURCES)


def serve_config(**cluster: Any) -> ServeConfig:
    return ServeConfig(
        "base",
        [ModelEntry(name) for name in NAMES],
        max_model_len=128,
        max_queue=5000,
        page_size=PAGE,
        decode=DecodeConfig(
            batch_buckets=[1, 2, 4], max_num_seqs=6, replay_buckets=[4], group_quantum=2
        ),
        cluster=ClusterConfig(**{"beat_seconds": 0.05, "lost_seconds": 20.0, **cluster}),
    )


SPECS: dict[str, ModelSpec] = model_specs(BASE, SOURCES, 1)


class _Prefill(SymbolicPrefill):
    def run(self, plan: PrefillPlan) -> PrefillResult:
        time.sleep(PACE)
        return super().run(plan)


class _Decode(SymbolicDecode):
    def begin(self, plan: DecodePlan) -> list[Landed]:
        time.sleep(PACE)
        return super().begin(plan)


class Host:
    """One worker process's contents."""

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        port: int = 0,
        hosts: Sequence[str] = NAMES,
        dtype: str = "int64",
        change: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.name, self._loop, self._gate = name, cluster.loop, threading.Event()
        self._gate.set()
        self._link = cluster.link
        self._roots: dict[int, bytes] = {}
        cache, pool = PageCache(PAGES, PAGE), SymbolicPool(PAGES, PAGE)
        end = SymbolicConnector(name, pool, cluster.link)
        decode = cluster.config.decode
        self.worker: Any
        if name.startswith("prefill"):
            core = PrefillCore(name, cache, SPECS, BUCKETS)
            core.offer_unasked()
            executor = _Prefill(end, [*BUCKETS], self._roots.__getitem__)
            self.worker = PrefillWorker(core, executor)
        else:
            ids = (secrets.randbits(63) for _ in itertools.count())
            core = DecodeCore(name, cache, SPECS, decode, 64, transfer_ids=ids)
            self.worker = DecodeWorker(core, _Decode(end, decode))
        self._listen_to_roots(self.worker)
        side: Any = "prefill" if self.worker.covers else "decode"
        part = wire.Part(
            WorkerInfo(name, PAGES - 1, PAGE), side, () if self.worker.covers else tuple(hosts)
        )
        shape = cluster_shape(cluster.config, BASE, SOURCES, SPECS, dtype)
        shape = msgspec.structs.replace(shape, **change)
        self._loop.run(self._listen(shape, part, cluster.config.cluster.beat_seconds, port))

    def _listen_to_roots(self, worker: Worker) -> None:
        plain = worker.receive

        def receive(message: m.Message) -> None:
            if isinstance(message, m.Prefill | m.Replied):
                self._roots[message.sequence.id] = message.sequence.root
            plain(message)

        worker.receive = receive  # type: ignore[method-assign]

    def _stats(self) -> EngineStats:
        workers = [self.worker]
        prefill = [w for w in workers if w.covers]
        decode = [w for w in workers if not w.covers]
        return worker_stats(prefill, decode, {}, lambda counters: _sum(counters))

    def _pools(self) -> list[PoolView]:
        readers = {} if self.worker.covers else {self.name: self.worker.core.readers()}
        return pool_views({self.name: self.worker.cache}, readers)

    async def _listen(self, shape: wire.Shape, part: wire.Part, beat: float, port: int) -> None:
        self.station = Station(shape, [part], self._stats, beat, pools=self._pools)
        app = web.Application()
        app.router.add_get(wire.PATH, self.station.handle)
        self.runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await self.runner.setup()
        self._sock = socket.create_server(("127.0.0.1", port))
        await web.SockSite(self.runner, self._sock).start()
        self.port = self._sock.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.thread = WorkerThread(self.name, [self.worker], self.station.send, self._failed)
        self.thread.start()
        self.station.open(self.thread)

    def _failed(self, worker: str, reason: str) -> None:
        raise AssertionError(f"{worker}: {reason}")

    def hang(self) -> None:
        """The worker's thread stands still from now on; the network goes on."""
        self._gate.clear()
        self.thread.call(self._stand_still)

    def _stand_still(self) -> None:
        self._gate.wait(120)

    def go_on(self) -> None:
        self._gate.set()

    def drain(self) -> bool:
        return self._loop.run(self.station.drain(60))

    def kill(self) -> None:
        """Nothing is said to anybody; connections break, and offers are gone."""

        async def cut() -> None:
            for frontend in tuple(self.station._frontends.values()):
                frontend.socket._writer.transport.abort()  # type: ignore[union-attr]
            await end_server(self.runner, self._sock)

        self._loop.run(cut())
        self.stop()

    def stop(self) -> None:
        self.go_on()
        self._loop.run(self.station.close())
        self._loop.run(end_server(self.runner, self._sock))
        self.thread.stop()
        self._link.drop_worker(self.name)

    def check_idle(self) -> None:
        """Soon nobody holds a page here, and nothing is remembered of any sequence."""
        wait_until(lambda: not self.worker.held_ids())
        wait_until(lambda: self.worker.cache.counts().used == 0)
        done = threading.Event()

        def check() -> None:
            self.worker.cache.check(idle=True)
            done.set()

        self.thread.call(check)
        assert done.wait(60), "the page books are wrong"


def _sum(counters: Any) -> dict[Any, int]:
    total: dict[Any, int] = {}
    for counter in counters:
        for key, count in dict(counter).items():
            total[key] = total.get(key, 0) + count
    return total


class Reply:
    """What a client has got of a request, and what it should get."""

    def __init__(self, request: Request, expected: list[int]):
        self.request, self.expected = request, expected
        self.events: queue.Queue[RequestOutput] = queue.Queue()
        self.tokens: list[int] = []
        self.reason: FinishReason | None = None
        self.error: str | None = None
        self.usage: PromptUsage | None = None

    def next_event(self) -> RequestOutput:
        event = self.events.get(timeout=60)
        assert self.reason is None, "an event came after the last one"
        self.tokens += event.token_ids
        assert self.tokens == self.expected[: len(self.tokens)], "wrong tokens"
        self.usage = event.usage or self.usage
        self.reason, self.error = event.finish_reason, event.error
        return event

    def wait(self) -> Reply:
        while self.reason is None:
            self.next_event()
        return self

    def check(self) -> None:
        """It ends with all its tokens."""
        self.wait()
        assert self.reason is FinishReason.LENGTH, self.error
        assert self.tokens == self.expected


class Frontend:
    """One frontend, and a client of it."""

    def __init__(self, config: ServeConfig):
        self.engine = ClusterEngine(config, BASE, SOURCES)
        self._numbers = itertools.count()

    def start(self, *, wait: bool = True) -> None:
        thread = threading.Thread(target=self.engine.start, daemon=True)
        thread.start()
        if wait:
            thread.join(60)
            assert self.engine.ready

    def submit(self, model: str, prompt: Sequence[int], max_tokens: int = 8) -> Reply:
        spec = SPECS[model]
        covered = spec.split_rule.split(prompt).covered
        writer = prefill_writer(spec.prefill_weights, root_key(spec.namespace, ""))
        expected = oracle(writer, module(spec.group, -1), prompt, covered, max_tokens)
        params = SamplingParams(max_tokens=max_tokens)
        request = Request(f"r{next(self._numbers)}", model, tuple(prompt), params)
        reply = Reply(request, expected)
        self.engine.submit(request, reply.events.put)
        return reply

    def die(self) -> None:
        """Its links break; whatever it had is nobody's."""
        self.engine._links.stop()

    def stop(self) -> None:
        self.engine.stop()


class Cluster:
    """Hosts and frontends."""

    def __init__(self, **cluster: Any):
        self.config = serve_config(**cluster)
        self.loop, self.link = Loop(), Link()
        self.hosts: dict[str, Host] = {}
        self.frontends: list[Frontend] = []

    def host(self, name: str, port: int = 0, **options: Any) -> Host:
        self.hosts[name] = Host(self, name, port, **options)
        return self.hosts[name]

    def again(self, name: str) -> Host:
        """Another process takes the place of one that has ended."""
        return self.host(name, self.hosts.pop(name).port)

    def frontend(self, *, wait: bool = True, **cluster: Any) -> Frontend:
        addresses = [host.address for host in self.hosts.values()]
        settings = replace(self.config.cluster, workers=addresses, **cluster)
        frontend = Frontend(replace(self.config, cluster=settings))
        self.frontends.append(frontend)
        frontend.start(wait=wait)
        return frontend

    def linked(self, count: int | None = None) -> None:
        """Waits until every frontend is linked to every host."""
        count = len(self.frontends) if count is None else count
        for host in self.hosts.values():
            wait_until(lambda host=host: host.station.num_frontends == count)

    def check_idle(self) -> None:
        for host in self.hosts.values():
            host.check_idle()
        for frontend in self.frontends:
            router = frontend.engine._dispatcher._router
            wait_until(lambda router=router: not router._assigned)
            assert all(worker.load == 0 for worker in router._decode.values())
        wait_until(lambda: not self.link.offers)

    def close(self) -> None:
        for frontend in self.frontends:
            frontend.stop()
        for host in self.hosts.values():
            host.stop()
        self.loop.close()


@contextmanager
def symbolic_cluster(
    *, prefill: int = 2, decode: int = 2, frontends: int = 2, **cluster: Any
) -> Iterator[Cluster]:
    """A cluster whose frontends are ready."""
    running = Cluster(**cluster)
    try:
        for side, count in (("prefill", prefill), ("decode", decode)):
            for i in range(count):
                running.host(f"{side}{i}")
        for _ in range(frontends):
            running.frontend()
        yield running
    finally:
        running.close()
