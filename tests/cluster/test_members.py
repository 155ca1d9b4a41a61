"""Workers that frontends are told of while they serve, and others that they are told no more of."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import aiohttp
import pytest

from pshare_jax.cluster import wire
from pshare_jax.errors import ConfigError
from tests.cluster.symbolic import NAMES, Cluster, symbolic_cluster
from tests.cluster.test_links import ask, check
from tests.engine.harness import wait_until


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """1 x 1, and one frontend; at the end nobody holds anything."""
    with symbolic_cluster(prefill=1, decode=1, frontends=1, max_attempts=50) as cluster:
        yield cluster
        cluster.check_idle()


def tell(cluster: Cluster) -> None:
    for frontend in cluster.frontends:
        frontend.engine.set_workers([host.address for host in cluster.hosts.values()])


def test_workers_are_added_while_sequences_run(cluster: Cluster) -> None:
    (frontend,) = cluster.frontends
    running = ask(cluster.frontends, 1, 20, tokens=60)
    running[0].next_event()
    for name in ("decode1", "prefill1"):
        cluster.host(name)
    tell(cluster)
    cluster.linked()
    check(running)
    check(ask(cluster.frontends, 2, 40))
    assert cluster.hosts["decode1"].worker.cache.num_indexed > 0
    assert cluster.hosts["prefill1"].worker.cache.num_indexed > 0
    assert set(frontend.engine.workers()) == {host.address for host in cluster.hosts.values()}
    assert not any(frontend.engine.workers().values())


def test_who_is_taken_off_the_list_is_lost_at_once(cluster: Cluster) -> None:
    """Though its link is up; what it was doing is done by others."""
    (frontend,) = cluster.frontends
    cluster.host("decode1")
    tell(cluster)
    cluster.linked()
    running = ask(cluster.frontends, 3, 20, tokens=60)
    running[0].next_event()
    gone = cluster.hosts.pop("decode0")
    tell(cluster)
    check(running)
    wait_until(lambda: gone.station.num_frontends == 0)
    gone.check_idle()
    assert frontend.engine.failed_workers == {}
    assert frontend.engine._dispatcher._router.workers == ["prefill0", "decode1"]
    gone.stop()


def test_another_takes_over_a_name_from_one_that_still_runs(cluster: Cluster) -> None:
    """One that a launcher cannot reach any more, perhaps: frontends have one of a name."""
    (frontend,) = cluster.frontends
    running = ask(cluster.frontends, 4, 20, tokens=60)
    running[0].next_event()
    old = cluster.hosts.pop("decode0")
    cluster.host("decode0")
    assert cluster.hosts["decode0"].address != old.address
    tell(cluster)
    check(running)
    check(ask(cluster.frontends, 5, 10))
    assert old.station.num_frontends == 0
    old.check_idle()
    assert frontend.engine.workers() == {host.address: "" for host in cluster.hosts.values()}
    old.stop()


def test_a_frontend_is_told_before_it_has_begun() -> None:
    """Of the only worker that it will find."""
    with symbolic_cluster(prefill=1, decode=1, frontends=0) as cluster:
        frontend = cluster.frontend(wait=False)
        cluster.host("decode1")
        cluster.hosts.pop("decode0").stop()
        tell(cluster)
        cluster.linked()
        wait_until(lambda: frontend.engine.ready)
        check([frontend.submit(NAMES[0], [1, 2, 3])])


def test_a_worker_that_ends_waits_for_nobody_s_hello(caplog: pytest.LogCaptureFixture) -> None:
    """It would not hear one any more."""
    with symbolic_cluster(prefill=1, decode=1, frontends=0) as cluster:
        host = cluster.hosts.pop("decode0")

        async def connect() -> tuple[aiohttp.ClientSession, asyncio.Task[aiohttp.WSMessage]]:
            session = aiohttp.ClientSession()
            socket = await session.ws_connect(f"http://{host.address}{wire.PATH}")
            return session, asyncio.create_task(socket.receive())

        session, told = cluster.loop.run(connect())
        wait_until(lambda: host.station._arriving)
        host.stop()
        wait_until(told.done)
        assert told.result().type is aiohttp.WSMsgType.CLOSE
        assert host.station._arriving == set()
        cluster.loop.run(session.close())
    assert "without a hello" not in caplog.text


def test_the_load_is_that_of_the_frontend_and_of_all_workers(cluster: Cluster) -> None:
    (frontend,) = cluster.frontends
    check(ask(cluster.frontends, 6, 10))
    wait_until(lambda: frontend.engine.load().computed_tokens > 0)
    load = frontend.engine.load()
    assert (load.incarnation, load.decode_workers) == (frontend.engine.incarnation, 1)
    assert load.pages == cluster.hosts["decode0"].worker.cache.num_usable
    assert (load.waiting_tokens, load.sequences) == (0, 0)


@pytest.mark.parametrize("addresses", [[], ["nowhere"], ["127.0.0.1:70000"]])
def test_what_is_no_address_is_refused(cluster: Cluster, addresses: list[str]) -> None:
    (frontend,) = cluster.frontends
    before = frontend.engine.workers()
    with pytest.raises(ConfigError):
        frontend.engine.set_workers(addresses)
    assert frontend.engine.workers() == before
