"""The aiohttp application: routes, and what happens around every handler."""

from __future__ import annotations

import hmac
import logging

from aiohttp import web
from aiohttp.typedefs import Handler

from pshare_jax.serve import handlers, info
from pshare_jax.serve.engine_api import Engine
from pshare_jax.serve.errors import ApiError, as_api_error
from pshare_jax.serve.service import SERVICE, Service
from pshare_jax.serve.sse import WriteTimeout

log = logging.getLogger(__name__)

# What probes and scrapers ask has no secrets, and they have no keys.
_PUBLIC_PATHS = frozenset({"/health", "/ready", "/metrics", "/version"})


def build_app(engine: Engine) -> web.Application:
    """The application over `engine`. To be called on the event loop that will run it."""
    service = Service(engine)
    app = web.Application(
        client_max_size=service.config.max_body_bytes,
        middlewares=[_finish_in_time, _errors_as_json, _authorize],
    )
    app[SERVICE] = service
    app.router.add_post("/v1/completions", handlers.completions)
    app.router.add_post("/v1/chat/completions", handlers.chat_completions)
    app.router.add_get("/v1/models", info.list_models)
    app.router.add_get("/v1/models/{model:.+}", info.get_model)
    app.router.add_post("/tokenize", info.tokenize)
    app.router.add_post("/detokenize", info.detokenize)
    app.router.add_get("/health", info.health)
    app.router.add_get("/ready", info.ready)
    app.router.add_get("/metrics", info.metrics)
    app.router.add_get("/version", info.version)
    return app


@web.middleware
async def _finish_in_time(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Sends the response here, where a client that does not read it can be cut off."""
    response = await handler(request)
    async with WriteTimeout(request, request.app[SERVICE].config.write_timeout_seconds):
        await response.prepare(request)
        await response.write_eof()
    return response


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ConnectionError:
        raise  # nobody is left to be told
    except Exception as error:
        api_error = as_api_error(error)
        if api_error is None:
            log.exception("a bug while handling %s %s", request.method, request.path)
            api_error = ApiError(500, "internal error", code="internal_error")
        return api_error.response()


@web.middleware
async def _authorize(request: web.Request, handler: Handler) -> web.StreamResponse:
    key = request.app[SERVICE].config.api_key
    if key and request.path not in _PUBLIC_PATHS:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        # Bytes: compare_digest refuses text outside ASCII, and headers may hold any.
        same = hmac.compare_digest(
            given.strip().encode(errors="surrogateescape"), key.encode(errors="surrogateescape")
        )
        if scheme.lower() != "bearer" or not same:
            raise ApiError(
                401,
                "missing or wrong API key; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
    return await handler(request)
