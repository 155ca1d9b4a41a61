"""A worker process's HTTP side: health, metrics, pages for other hosts, and links of frontends."""

from __future__ import annotations

import asyncio
import hmac
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0

from pshare_jax.cluster import wire
from pshare_jax.cluster.station import Station
from pshare_jax.core.connector import TransferError
from pshare_jax.engine.hosted import HostedWorkers
from pshare_jax.kv.coding import HEADER, PageCoder, read_wanted
from pshare_jax.kv.direct import DirectOffers
from pshare_jax.kv.offers import OfferFolder, take
from pshare_jax.kv.sending import coded_frames, learn, plain_frames, send
from pshare_jax.serve.info import json_response
from pshare_jax.serve.metrics import Metrics

_PUBLIC = frozenset({"/health", "/ready", "/metrics"})
Sent = Callable[[int], Awaitable[None]]

OFFERS = web.AppKey("offers", OfferFolder)
STATION = web.AppKey("station", Station)
HOSTED = web.AppKey("hosted", HostedWorkers)
METRICS = web.AppKey("metrics", Metrics)


def worker_app(
    hosted: HostedWorkers, station: Station, token: str, *, certified: bool = False
) -> web.Application:
    """The application of a worker process.

    Args:
        hosted: the workers.
        station: takes the links of frontends.
        token: without which nobody gets more than health and metrics; empty lets everybody in.
        certified: whether the same holds for who shows no certificate.
    """
    app = web.Application(middlewares=[_authorise(token, certified=certified)])
    app[OFFERS], app[STATION], app[HOSTED] = hosted.pages.offers, station, hosted
    app[METRICS] = Metrics(hosted.models, hosted.stats)
    app.router.add_get("/health", health)
    app.router.add_get("/ready", ready)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/pages/{transfer:[0-9a-f]{16}}", pages)
    app.router.add_post("/pages/{transfer:[0-9a-f]{16}}/claim", claim)
    app.router.add_delete("/pages/{transfer:[0-9a-f]{16}}/claim", settle)
    app.router.add_get(wire.PATH, station.handle)
    return app


async def health(request: web.Request) -> web.Response:
    """`GET /health`: 503 once the engine does not get on; names the workers."""
    station, hosted = request.app[STATION], request.app[HOSTED]
    return json_response(
        {
            "status": "stuck" if station.is_stuck else _state(station),
            "workers": [worker.name for worker in hosted.workers],
            "frontends": station.num_frontends,
        },
        503 if station.is_stuck else 200,
    )


async def ready(request: web.Request) -> web.Response:
    """`GET /ready`: 200 while frontends are taken."""
    state = _state(request.app[STATION])
    return json_response({"status": state}, 200 if state == "ok" else 503)


async def metrics(request: web.Request) -> web.Response:
    """`GET /metrics`."""
    body = await asyncio.to_thread(request.app[METRICS].render)
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_PLAIN_1_0_0})


async def pages(request: web.Request) -> web.StreamResponse:
    """`GET /pages/TRANSFER`: the bytes of a transfer that is on offer; nobody gets them again."""
    return await send_pages(request, request.app[OFFERS].path, request.app[HOSTED].pages.coder)


async def claim(request: web.Request) -> web.Response:
    """`POST /pages/TRANSFER/claim`: has a transfer pulled by `jax.experimental.transfer`."""
    return await claim_pages(request, request.app[HOSTED].pages.direct)


async def settle(request: web.Request) -> web.Response:
    """`DELETE /pages/TRANSFER/claim`: what was claimed has come."""
    direct = request.app[HOSTED].pages.direct
    if direct is not None:
        direct.settle(int(request.match_info["transfer"], 16))
    return web.Response()


async def claim_pages(request: web.Request, direct: DirectOffers | None) -> web.Response:
    """Claims the transfer that the path names, and says where it is to be pulled from."""
    number = int(request.match_info["transfer"], 16)
    wanted = read_wanted(request.headers.get(HEADER))
    try:
        if direct is None:
            raise TransferError(f"transfer {number}: nothing is on offer")
        # Whoever serves requests must not wait for devices.
        claimed = await asyncio.to_thread(direct.claim, number, wanted)
    except TransferError as error:
        raise web.HTTPNotFound(text=str(error)) from None
    return web.Response(body=msgspec.json.encode(claimed), content_type="application/json")


async def send_pages(
    request: web.Request, folder: Path, coder: PageCoder | None = None, sent: Sent | None = None
) -> web.StreamResponse:
    """Sends what a folder has on offer under the transfer that the path names.

    Pages are coded by `coder` where the request asks for that, one while the one before is sent.
    After so many bytes `sent` is called, if it is given.
    """
    try:
        descriptor = take(folder, int(request.match_info["transfer"], 16))
    except TransferError as error:
        raise web.HTTPNotFound(text=str(error)) from None
    with os.fdopen(descriptor, "rb"):
        response = web.StreamResponse()
        wanted = read_wanted(request.headers.get(HEADER))
        if coder is not None and wanted is not None and coder.learns:
            await asyncio.to_thread(learn, descriptor, coder)
        coding = coder.answer(wanted) if coder is not None else None
        if coding is not None:
            response.headers[HEADER] = coding.header()
        if coder is not None and coding is not None and coding.coded:
            frames: Iterator[bytes | memoryview] = coded_frames(descriptor, coder, coding)
        else:
            frames = plain_frames(descriptor)
            response.content_length = os.fstat(descriptor).st_size
        await response.prepare(request)

        async def write(frame: bytes | memoryview) -> None:
            await response.write(frame)
            if sent is not None:
                await sent(len(frame))

        await send(frames, write)
        await response.write_eof()
    return response


def _state(station: Station) -> str:
    if station.draining:
        return "draining"
    return "ok" if station.ready else "warming_up"


def _authorise(token: str, *, certified: bool) -> Middleware:
    @web.middleware
    async def authorise(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        said = given.encode("utf-8", "surrogateescape")
        known = not token or hmac.compare_digest(said, token.encode())
        public = request.path in _PUBLIC
        if not known and not public:
            raise web.HTTPUnauthorized(text="the token of this cluster is another one")
        # One that the CA has not signed has not got this far.
        if certified and not public and not request.get_extra_info("peercert"):
            raise web.HTTPUnauthorized(text="show a certificate of this cluster's CA")
        return await handler(request)

    return authorise
