"""What a frontend lets whoever has the cluster's token see and say: its workers, and the load."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

from aiohttp import web
from msgspec import Struct

from pshare_jax.cluster.secret import read_token
from pshare_jax.core.load import Load
from pshare_jax.errors import ConfigError
from pshare_jax.serve.errors import ApiError
from pshare_jax.serve.info import json_response
from pshare_jax.serve.parsing import read_request
from pshare_jax.serve.service import SERVICE

PATH = "/cluster/workers"
_TOKEN = web.AppKey("cluster_token", str)


class Workers(Struct):
    """`PUT /cluster/workers`: `HOST:PORT` of all worker processes that there are."""

    workers: list[str]


class FrontendState(Struct):
    """`GET /cluster/workers`: why there is no link, by worker process, empty where there is one;
    and the load, once requests are taken."""

    workers: dict[str, str]
    load: Load | None = None


class Frontend(Protocol):
    """What `engine.cluster.ClusterEngine` has beside what all engines have."""

    def set_workers(self, addresses: Sequence[str]) -> None:
        """Has these workers and no others; raises ConfigError."""
        ...

    def workers(self) -> Mapping[str, str]:
        """Addresses, and why there is no link."""
        ...

    def load(self) -> Load:
        """What waits and runs; blocks for a moment."""
        ...


def add_routes(app: web.Application) -> None:
    """Adds the endpoint to a frontend's application."""
    app[_TOKEN] = read_token(app[SERVICE].engine.config.cluster.token_file)
    app.router.add_get(PATH, show)
    app.router.add_put(PATH, change)


async def show(request: web.Request) -> web.Response:
    """`GET /cluster/workers`."""
    frontend = _admitted(request)
    ready = request.app[SERVICE].engine.ready
    load = await asyncio.to_thread(frontend.load) if ready else None
    return json_response(FrontendState(dict(frontend.workers()), load))


async def change(request: web.Request) -> web.Response:
    """`PUT /cluster/workers`; workers that are not named are lost at once, so drain them first."""
    frontend = _admitted(request)
    body = await read_request(request, Workers)
    try:
        frontend.set_workers(body.workers)
    except ConfigError as error:
        raise ApiError(400, str(error), param="workers") from error
    return json_response(body)


def _admitted(request: web.Request) -> Frontend:
    """The engine, if who asks has the cluster's token.

    Raises:
        ApiError: 403, says why not.
    """
    token = request.app[_TOKEN]
    if not token:
        raise ApiError(403, "this frontend has no cluster.token_file, so nobody may change it")
    given = request.headers.get("Authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode()):
        raise ApiError(403, "the token of this cluster is another one")
    return cast(Frontend, request.app[SERVICE].engine)
