"""Frontends that come to a worker process which is busy with the end of something."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

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


class Held:
    """A method of a station that is done in the workers' thread: it waits until it may go on."""

    def __init__(self, station: cluster_station.Station, name: str):
        self._station = station
        self._going, self._may_go = threading.Event(), threading.Event()
        self._requests: list[asyncio.Task[None]] = []
        plain, serve = getattr(station, name), station._serve

        def held(*args: Any) -> None:
            self._going.set()
            self._may_go.wait(60)
            plain(*args)

        async def noted(frontend: cluster_station._Frontend) -> None:
            request = asyncio.current_task()
            assert request is not None
            self._requests.append(request)
            await serve(frontend)

        setattr(station, name, held)
        station._serve = noted  # type: ignore[method-assign]

    async def begun(self) -> None:
        """Waits until it is being done."""
        await asyncio.to_thread(wait_until, self._going.is_set)

    def cancel_first(self) -> None:
        """Cancels the request of the first link, as when its connection is lost."""
        self._station._loop.call_soon_threadsafe(self._requests[0].cancel)

    def go_on(self) -> None:
        self._may_go.set()


async def test_it_is_taken_once_what_it_had_has_been_given_up(cluster: Cluster) -> None:
    """Else that would be done to what it sends by the new link.

    That comes to an end though the request is cancelled meanwhile, as when a connection is lost.
    """
    host = cluster.hosts["prefill0"]
    station, leaving = host.station, Held(host.station, "_leave")
    async with aiohttp.ClientSession() as session:
        first, second = Linked(cluster, session), Linked(cluster, session)
        await first.hello()
        await first.until(wire.Welcome)
        (old,) = station._frontends.values()
        await second.hello()
        await leaving.begun()
        assert old.socket.closed
        leaving.cancel_first()
        try:
            for _ in range(20):
                assert [*station._frontends.values()] == [old], "it was taken too early"
                await asyncio.sleep(0.01)
        finally:
            leaving.go_on()
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
    joining = Held(cluster.hosts["prefill0"].station, "_join")
    async with aiohttp.ClientSession() as session:
        first, second = Linked(cluster, session), Linked(cluster, session)
        await first.hello()
        await joining.begun()
        joining.cancel_first()
        joining.go_on()
        await second.hello()
        assert await second.until(wire.Welcome)


async def test_who_waits_while_it_begins_to_drain_is_told_to_come_again(cluster: Cluster) -> None:
    station = cluster.hosts["prefill0"].station
    leaving = Held(station, "_leave")
    async with aiohttp.ClientSession() as session:
        first, second = Linked(cluster, session), Linked(cluster, session)
        await first.hello()
        await first.until(wire.Welcome)
        await second.hello()
        await leaving.begun()
        station._draining = True
        leaving.go_on()
        assert await second.until(wire.Refused) == wire.Refused("draining", again=True)


async def test_who_comes_while_it_drains_is_told_to_come_again(cluster: Cluster) -> None:
    """With nobody linked it is done at once; it would end under whoever comes now."""
    assert await asyncio.to_thread(cluster.hosts["prefill0"].drain)
    async with aiohttp.ClientSession() as session:
        late = Linked(cluster, session)
        await late.hello()
        assert await late.until(wire.Refused) == wire.Refused("draining", again=True)
    assert cluster.hosts["prefill0"].station.num_frontends == 0
