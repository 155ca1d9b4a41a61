"""One link, to a worker process that does as the test likes."""

from __future__ import annotations

import asyncio

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

from pshare_jax.cluster import wire
from pshare_jax.cluster.link import Link, LinkTimes
from pshare_jax.engine.shape import cluster_shape
from tests.cluster.symbolic import BASE, SOURCES, SPECS, serve_config


async def test_a_link_that_is_cancelled_while_it_is_closed_leaves_nothing() -> None:
    """Who is linked to does not agree to the end, and the frontend stops meanwhile."""
    closing, over = asyncio.Event(), asyncio.Event()

    async def refuse(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(autoclose=False)
        await socket.prepare(request)
        await socket.receive()
        await socket.send_bytes(wire.encode([wire.Refused("not today", again=True)]))
        assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
        closing.set()
        await over.wait()
        return socket

    app = web.Application()
    app.router.add_get(wire.PATH, refuse)
    shape = cluster_shape(serve_config(), BASE, SOURCES, SPECS, "int64")
    hello = wire.Hello(wire.PROTOCOL, 5, shape, "a frontend")
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        link = Link(
            f"127.0.0.1:{server.port}",
            hello,
            "",
            None,
            LinkTimes(beat_seconds=60),
            lambda link: None,
            lambda link, frame: None,
            lambda link, reason: None,
        )
        try:
            running = asyncio.create_task(link.run(session))
            await asyncio.wait_for(closing.wait(), 60)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            coroutines = {task.get_coro().__qualname__ for task in asyncio.all_tasks()}  # type: ignore[union-attr]
            assert "ClientWebSocketResponse.close" not in coroutines
        finally:
            over.set()
