"""What the pools of a cluster hold, as a page in the browser is told by a frontend."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from pshare_jax.cluster import looks
from pshare_jax.cluster.looks import PoolLooks, SeenPools
from pshare_jax.core.pages.sharing_map import PoolView, SeenPage
from pshare_jax.serve import live
from pshare_jax.serve.live import Live
from pshare_jax.serve.offload import Offload
from pshare_jax.serve.session_log import SessionLog
from tests.cluster.symbolic import Cluster, symbolic_cluster


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with symbolic_cluster() as cluster:
        yield cluster


async def maps(engine: Any, wanted: Any) -> dict[str, Any]:
    """The first `map` event of a stream that is `wanted`."""
    offload = Offload(1)
    watched = Live(engine, offload, SessionLog())
    try:
        async with asyncio.timeout(60):
            async for events in watched.watch():
                for event in map(json.loads, events):
                    if event["type"] == "map" and wanted(event):
                        return event
    finally:
        watched.close()
        offload.close()
    raise AssertionError("the stream has ended")


def pages(event: dict[str, Any]) -> list[Any]:
    return [page for context in event["contexts"] for page in context["pages"]]


async def test_a_frontend_shows_what_the_workers_pools_hold(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that has sent nothing itself; who computed a page, and in which pools it lies."""
    monkeypatch.setattr(live, "INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(live, "SHARE", 1.0)
    monkeypatch.setattr(looks, "SHARE", 1.0)
    prompt = list(range(40, 57))
    asked, other = cluster.frontends
    asked.submit("full", prompt, 4).check()

    def is_shared(page: Any) -> bool:
        return len(page[3]) == 2 and not page[2]

    event = await maps(other.engine, lambda e: sum(map(is_shared, pages(e))) >= 4)
    assert event["page_size"] == 4
    (context,) = [c for c in event["contexts"] if not c["parent"]]
    for tokens, runs, readers, pools, arriving, tiers in context["pages"][:4]:
        assert (tokens, runs, readers, arriving, tiers) == (4, [["full", 4]], [], False, [])
        assert [re.sub(r"\d", "", pool) for pool in pools] == ["decode", "prefill"]
    # Another model adds what was not there, and the map says so.
    asked.submit("identity", [*prompt, *range(10)], 4).check()
    event = await maps(asked.engine, lambda e: any(["identity", 4] in p[1] for p in pages(e)))
    assert any(p[1] == [["full", 4]] for p in pages(event))
    # It says how many tokens, never which, and names no key.
    assert all(len(context["id"]) == 16 for context in event["contexts"])


async def test_the_pages_of_who_is_lost_are_not_shown(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(live, "SHARE", 1.0)
    frontend = cluster.frontends[0]
    frontend.submit("full", list(range(20)), 4).check()
    event = await maps(frontend.engine, lambda e: any(len(p[3]) == 2 for p in pages(e)))
    (shared,) = {tuple(page[3]) for page in pages(event) if len(page[3]) == 2}
    dead = shared[0]
    await asyncio.to_thread(cluster.hosts.pop(dead).kill)
    event = await maps(frontend.engine, lambda e: not any(dead in p[3] for p in pages(e)))
    assert any(shared[1] in page[3] for page in pages(event))


def view(worker: str, *keys: bytes) -> PoolView:
    return PoolView(worker, 8, [SeenPage(k, b"", 8, [], [], False, []) for k in keys], 0)


async def test_a_worker_looks_rarely_whoever_asks() -> None:
    """A look that took 10 ms of the processor is followed by a second without any."""
    now, held = [0.0], [view("decode0", b"a")]
    looked = []
    pools = PoolLooks(lambda: looked.append(now[0]) or held, lambda: now[0])
    plain = pools._encoded
    pools._encoded = lambda: (plain()[0], 0.01)  # type: ignore[method-assign]
    await asyncio.gather(*(pools.newest() for _ in range(5)))
    assert (looked, pools.number) == ([0.0], 1)
    now[0] = 0.99
    held.append(view("prefill0", b"a"))
    await pools.newest()
    assert (looked, pools.number) == ([0.0], 1)
    now[0] = 1.01
    await pools.newest()
    assert (looked, pools.number) == ([0.0, 1.01], 2)
    now[0] = 2.5
    await pools.newest()
    # What is the same has the same number, and is not sent again.
    assert (len(looked), pools.number) == (3, 2)


async def test_a_frontend_asks_once_until_it_is_answered() -> None:
    pools = PoolLooks(lambda: [view("decode0", b"a", b"b")])
    await pools.newest()
    seen = SeenPools()
    assert seen.ask("x") == 0
    assert seen.ask("x") is None
    assert seen.views() == []
    seen.hear("x", pools.number, pools.data)
    assert [len(v.pages) for v in seen.views()] == [2]
    assert seen.ask("x") == pools.number
    seen.hear("x", pools.number, b"")
    assert [len(v.pages) for v in seen.views()] == [2]
    assert seen.ask("x") == pools.number, "nothing had changed: it may have since"
    seen.lose("x")
    assert seen.views() == []
    # An answer that was on its way is forgotten with the link.
    seen.hear("x", 7, b"")
    assert seen.ask("x") == 0
