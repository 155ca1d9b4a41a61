"""Frontends that come to a worker process which is busy with the end of something."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import aiohttp
import pytest

from pshare_jax.cluster import station as cluster_station
from pshare_jax.cluster import wire
from pshare_jax.core import messages as m
from pshare_jax.engine.shape import cluster_shape
from tests.cluster.symbolic import BASE, SOURCES, SPECS, Cluster, symbolic_cluster
from tests.engine.harness import wait_until


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    # Nobody reads what the first link is told at its end.
    monkeypatch.setattr(cluster_station, "CLOSE_SECONDS", 0.05)
    with symbolic_cluster(prefill=1, decode=0, frontends=0) as cluster:
        yield cluster


class Linked:
    """A frontend's websocket; always of the same frontend."""

    def __init__(self, cluster: Cluster, session: aiohttp.ClientSession):
        self._cluster, self._session = cluster, session

    async def hello(self) -> None:
        address = self._cluster.hosts["prefill0"].address
        self._socket = await self._session.ws_connect(f"http://{address}{wire.PATH}")
        shape = cluster_shape(self._cluster.config, BASE, SOURCES, SPECS, "int64")
        hello = wire.Hello(wire.PROTOCOL, 5, shape, "the same process")
        await self._socket.send_bytes(wire.encode([hello]))

    async def until(self, kind: type) -> wire.Frame:
        """The first frame of a kind."""
        async with asyncio.timeout(60):
            while True:
                for frame in wire.decode(await self._socket.receive_bytes()):
                    if isinstance(frame, kind):
                        return frame


async def test_it_is_taken_once_what_it_had_has_been_given_up(cluster: Cluster) -> None:
    """Else that would be done to what it sends by the new link.

    That comes to an end though the request is cancelled meanwhile, as when a connection is lost.
    """
    host = cluster.hosts["prefill0"]
    station, going, may_go = host.station, threading.Event(), threading.Event()
    leave, serve = station._leave, station._serve
    requests: list[asyncio.Task[None] | None] = []

    def slowly(incarnation: int) -> None:
        going.set()
        may_go.wait(60)
        leave(incarnation)

    async def noted(frontend: cluster_station._Frontend) -> None:
        requests.append(asyncio.current_task())
        await serve(frontend)

    station._leave = slowly  # type: ignore[method-assign]
    station._serve = noted  # type: ignore[method-assign]
    async with aiohttp.ClientSession() as session:
        first, second = Linked(cluster, session), Linked(cluster, session)
        await first.hello()
        await first.until(wire.Welcome)
        (old,) = station._frontends.values()
        await second.hello()
        await asyncio.to_thread(wait_until, lambda: old.socket.closed and going.is_set())
        assert requests[0] is not None
        station._loop.call_soon_threadsafe(requests[0].cancel)
        try:
            for _ in range(20):
                assert [*station._frontends.values()] == [old], "it was taken too early"
                await asyncio.sleep(0.01)
        finally:
            may_go.set()
        await second.until(wire.Welcome)
        # What the worker's index holds; from then on it is told of all.
        await second.until(wire.Carry)
        assert station.num_frontends == 1
        changed = m.StoreChanged([b"key"], [])
        host.thread.call(lambda: station.send(host.name, m.DISPATCHER, changed))
        told = wire.Carry(host.name, m.DISPATCHER, changed)
        while await second.until(wire.Carry) != told:
            pass


async def test_it_is_taken_again_when_it_was_lost_in_the_middle_of_its_welcome(
    cluster: Cluster,
) -> None:
    station, going, may_go = cluster.hosts["prefill0"].station, threading.Event(), threading.Event()
    join, serve = station._join, station._serve
    requests: list[asyncio.Task[None] | None] = []

    def slowly(frontend: cluster_station._Frontend) -> None:
        going.set()
        may_go.wait(60)
        join(frontend)

    async def noted(frontend: cluster_station._Frontend) -> None:
        requests.append(asyncio.current_task())
        await serve(frontend)

    station._join = slowly  # type: ignore[method-assign]
    station._serve = noted  # type: ignore[method-assign]
    async with aiohttp.ClientSession() as session:
        first, second = Linked(cluster, session), Linked(cluster, session)
        await first.hello()
        await asyncio.to_thread(wait_until, going.is_set)
        assert requests[0] is not None
        station._loop.call_soon_threadsafe(requests[0].cancel)
        may_go.set()
        await second.hello()
        await second.until(wire.Welcome)
    assert len(requests) == 2


async def test_who_waits_while_it_begins_to_drain_is_told_to_come_again(cluster: Cluster) -> None:
    station, may_go = cluster.hosts["prefill0"].station, threading.Event()
    leave = station._leave

    def slowly(incarnation: int) -> None:
        may_go.wait(60)
        leave(incarnation)

    station._leave = slowly  # type: ignore[method-assign]
    async with aiohttp.ClientSession() as session:
        first, second = Linked(cluster, session), Linked(cluster, session)
        await first.hello()
        await first.until(wire.Welcome)
        (old,) = station._frontends.values()
        await second.hello()
        await asyncio.to_thread(wait_until, lambda: old.socket.closed)
        station._draining = True
        may_go.set()
        assert await second.until(wire.Refused) == wire.Refused("draining", again=True)


async def test_who_comes_while_it_drains_is_told_to_come_again(cluster: Cluster) -> None:
    """With nobody linked it is done at once; it would end under whoever comes now."""
    assert await asyncio.to_thread(cluster.hosts["prefill0"].drain)
    async with aiohttp.ClientSession() as session:
        late = Linked(cluster, session)
        await late.hello()
        assert await late.until(wire.Refused) == wire.Refused("draining", again=True)
    assert cluster.hosts["prefill0"].station.num_frontends == 0
