"""Worker processes without the processes: real links and pages over 127.0.0.1, in threads."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from aiohttp import web

from pshare_jax.cluster.station import Station
from pshare_jax.cluster.tls import cluster_tls
from pshare_jax.config import ClusterConfig, DecodeConfig, PrefillConfig, ServeConfig
from pshare_jax.engine.cluster import ClusterEngine
from pshare_jax.engine.hosted import HostedWorkers
from pshare_jax.kv.peers import Peers
from pshare_jax.serve.worker_app import worker_app
from tests.engine.harness import Client, Models, serve_config, wait_until

TOKEN = "a token that is long enough"


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


async def end_server(runner: web.AppRunner, sock: socket.socket) -> None:
    """Ends a server while clients are coming: what has been accepted is served first.

    A connection that is accepted as an asyncio server closes is left open and belongs to nobody
    (python/cpython issue 109564).
    """
    if runner.server is not None:
        asyncio.get_running_loop().remove_reader(sock)
        for _ in range(3):
            await asyncio.sleep(0)
    await runner.cleanup()


class Host:
    """One worker process's contents."""

    def __init__(self, config: ServeConfig, models: Models, role: Any, name: str, port: int = 0):
        self.name, self.role = name, role
        self._loop = Loop()
        self._tls = cluster_tls(config.cluster)
        self._sock = socket.create_server(("127.0.0.1", port))
        self.port = self._sock.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.hosted: HostedWorkers = HostedWorkers(
            config,
            role,
            name,
            models.base_source,
            models.sources,
            models.tokenizer,
            url=f"{'https' if self._tls else 'http'}://{self.address}",
            peers=Peers(TOKEN, self._tls.client if self._tls else None),
        )
        self._loop.run(self._listen(config))
        self.failures: list[str] = []
        self.hosted.start(self.station.send, lambda *failure: self.failures.append(str(failure)))
        self._loop.run(self._open())

    async def _listen(self, config: ServeConfig) -> None:
        hosted = self.hosted
        beat = config.cluster.beat_seconds
        self.station = Station(
            hosted.shape,
            hosted.parts,
            hosted.stats,
            beat,
            hosted.prepare,
            hosted.modules,
            hosted.pools,
            hosted.taken,
        )
        app = worker_app(hosted, self.station, TOKEN, certified=self._tls is not None)
        self.runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await self.runner.setup()
        context = self._tls.server if self._tls else None
        await web.SockSite(self.runner, self._sock, ssl_context=context).start()

    async def _open(self) -> None:
        assert self.hosted.thread is not None
        self.station.open(self.hosted.thread)

    @property
    def caches(self) -> list[Any]:
        return [worker.cache for worker in self.hosted.workers]

    def call(self, action: Callable[[], Any]) -> Any:
        """Does something in the workers' thread."""
        assert self.hosted.thread is not None
        done, result = threading.Event(), []
        self.hosted.thread.call(lambda: (result.append(action()), done.set()))
        assert done.wait(60)
        return result[0]

    def kill(self) -> None:
        """Nothing is said to anybody; connections break."""

        async def cut() -> None:
            for frontend in tuple(self.station._frontends.values()):
                frontend.socket._writer.transport.abort()  # type: ignore[union-attr]
            await end_server(self.runner, self._sock)

        self._loop.run(cut())
        self.stop()

    def stop(self) -> None:
        self._loop.run(self.station.close())
        self._loop.run(end_server(self.runner, self._sock))
        self.hosted.stop()
        self._loop.close()

    def check_idle(self) -> None:
        """Soon nobody holds a page, and nothing is on offer."""
        for cache in self.caches:
            wait_until(lambda cache=cache: cache.counts().used == 0)
        wait_until(lambda: len(self.hosted.pages.offers) == 0)
        for cache in self.caches:
            self.call(lambda cache=cache: cache.check(idle=True))


class Cluster:
    """Hosts and frontends."""

    def __init__(
        self,
        models: Models,
        folder: Path,
        settings: Mapping[str, Any] = MappingProxyType({}),
        **cluster: Any,
    ):
        token = folder / "token"
        token.write_text(TOKEN)
        self.models = models
        config = cluster_config(shm_path=str(folder), token_file=str(token), **cluster)
        self.config = replace(config, **settings)
        self.hosts: dict[str, Host] = {}
        self.clients: list[Client] = []

    def host(self, role: str, name: str, port: int = 0, **cluster: Any) -> Host:
        config = replace(self.config, cluster=replace(self.config.cluster, **cluster))
        self.hosts[name] = Host(config, self.models, role, name, port)
        return self.hosts[name]

    def again(self, name: str) -> Host:
        """Another process takes the place of one that has ended."""
        old = self.hosts.pop(name)
        return self.host(old.role, name, old.port)

    def frontend(self, config: ServeConfig | None = None, *, ready: bool = True) -> Client:
        config = config or self.config
        addresses = [host.address for host in self.hosts.values()]
        config = replace(config, cluster=replace(config.cluster, workers=addresses))
        models = self.models
        engine = ClusterEngine(config, models.base_source, models.sources, models.tokenizer)
        starting = threading.Thread(target=engine.start, daemon=True)
        starting.start()
        if ready:
            starting.join(60)
            assert engine.ready
        self.clients.append(Client(engine))  # type: ignore[arg-type]
        return self.clients[-1]

    def check_idle(self) -> None:
        for host in self.hosts.values():
            host.check_idle()

    def close(self) -> None:
        for client in self.clients:
            client.engine.stop()
        for host in self.hosts.values():
            host.stop()


def cluster_config(**cluster: Any) -> ServeConfig:
    """As `two_by_two`, but one engine a process."""
    return serve_config(
        prefill=PrefillConfig(engines=2, chunk_buckets=[16], num_pages=40),
        decode=DecodeConfig(
            engines=2, batch_buckets=[4], max_num_seqs=8, replay_buckets=[4], num_pages=28
        ),
        cluster=ClusterConfig(**{"beat_seconds": 0.05, "lost_seconds": 20.0, **cluster}),
    )


@contextmanager
def running_cluster(
    models: Models,
    folder: Path,
    *,
    prefill: int = 2,
    decode: int = 2,
    frontends: int = 1,
    settings: Mapping[str, Any] = MappingProxyType({}),
    **cluster: Any,
) -> Iterator[Cluster]:
    """A cluster whose frontends are ready; `settings` are other parts of the configuration."""
    running = Cluster(models, folder, settings, **cluster)
    try:
        for side, count in (("prefill", prefill), ("decode", decode)):
            for i in range(count):
                running.host(side, f"{side}{i}")
        for _ in range(frontends):
            running.frontend()
        yield running
    finally:
        running.close()


def ask(
    client: Client, names: Sequence[str], prompts: Sequence[Sequence[int]], tokens: int
) -> list[Any]:
    """A request for each prompt, models in turn."""
    return [
        (names[i % len(names)], prompt, client.submit(names[i % len(names)], prompt, tokens))
        for i, prompt in enumerate(prompts)
    ]
