"""The aiohttp application: routes, and what happens around every handler."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import uuid

from aiohttp import web
from aiohttp.typedefs import Handler

from pshare_jax.serve import (
    admin,
    cluster_api,
    cors,
    fanout,
    handlers,
    info,
    openapi,
    other_apis,
    ui,
)
from pshare_jax.serve.access import ACCESS, PUBLIC_PATHS, authorize, limit_requests, rate_headers
from pshare_jax.serve.bodies import body_too_large
from pshare_jax.serve.engine_api import Engine
from pshare_jax.serve.errors import ApiError, as_api_error
from pshare_jax.serve.messages_format import error_object
from pshare_jax.serve.service import REQUEST_ID, SERVICE, WARNINGS, Service
from pshare_jax.serve.sse import WriteTimeout

log = logging.getLogger(__name__)

_PUBLIC_PATHS = frozenset({"/health", "/ready", "/version", "/openapi.json"})
_METRICS_PATH = "/metrics"
_ANTHROPIC_PATH = "/v1/messages"
_POST = {
    "/v1/completions": handlers.completions,
    "/v1/chat/completions": handlers.chat_completions,
    "/v1/fanout": fanout.fan_out,
    "/v1/responses": other_apis.responses,
    "/v1/messages": other_apis.messages,
    "/v1/messages/count_tokens": other_apis.count_tokens,
    "/v1/load_lora_adapter": admin.load_adapter,
    "/v1/unload_lora_adapter": admin.unload_adapter,
    "/tokenize": info.tokenize,
    "/detokenize": info.detokenize,
}
_GET = {
    "/v1/models": info.list_models,
    "/v1/models/{model:.+}": info.get_model,
    "/health": info.health,
    "/ready": info.ready,
    _METRICS_PATH: info.metrics,
    "/version": info.version,
    "/openapi.json": openapi.describe,
}
# What may come back in a header and a log: no spaces, no control characters, of bounded length.
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


def build_app(engine: Engine) -> web.Application:
    """The application over `engine`. To be called on the event loop that will run it."""
    service = Service(engine)
    app = web.Application(
        client_max_size=service.config.max_body_bytes,
        middlewares=[
            _trace,
            _take_request_id,
            _finish_in_time,
            _errors_as_json,
            _cors,
            authorize,
            limit_requests,
        ],
    )
    app[SERVICE] = service
    app[ACCESS] = service.access
    app[PUBLIC_PATHS] = _PUBLIC_PATHS | ui.PUBLIC_PATHS | {cluster_api.PATH}
    app.on_response_prepare.append(_add_headers)
    app.on_cleanup.append(_close)
    for path, handler in _POST.items():
        for spelling in (path, f"{path}/"):
            app.router.add_route("POST", spelling, handler, expect_handler=_expect)
    for path, handler in _GET.items():
        if path == _METRICS_PATH and service.config.metrics == "off":
            continue
        for spelling in (f"{path}/", path):
            app.router.add_get(spelling, handler)
    if service.config.ui:
        ui.add_routes(app)
    if service.resumable:
        cluster_api.add_routes(app)
    return app


async def _close(app: web.Application) -> None:
    service = app[SERVICE]
    service.close()
    if service.tracing is not None:
        await asyncio.to_thread(service.tracing.close)


async def _expect(request: web.Request) -> web.StreamResponse | None:
    """Invites the body that `Expect: 100-continue` asks about, unless it is too large."""
    limit = request.app[SERVICE].config.max_body_bytes
    if request.headers.get("Expect", "").lower() != "100-continue":
        return ApiError(417, "the only Expect that is known is 100-continue", close=True).response()
    if request.content_length is not None and request.content_length > limit:
        return body_too_large(limit).response()
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    # The response to come starts after it.
    request.writer.output_size = 0
    return None


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["X-Request-Id"] = request.get(REQUEST_ID) or new_request_id()
    if warning := request.get(WARNINGS):
        response.headers["Warnings"] = warning
    response.headers.update(rate_headers(request))
    config = request.app[SERVICE].config
    if config.server_header:
        response.headers["Server"] = config.server_header
    else:
        response.headers.popall("Server", None)
    cors.add_headers(request, response, config.cors_origins)


def new_request_id() -> str:
    """For a response whose request has brought none."""
    return f"req-{uuid.uuid4().hex}"


@web.middleware
async def _trace(request: web.Request, handler: Handler) -> web.StreamResponse:
    tracing = request.app[SERVICE].tracing
    return await (handler(request) if tracing is None else tracing.trace(request, handler))


@web.middleware
async def _take_request_id(request: web.Request, handler: Handler) -> web.StreamResponse:
    given = request.headers.get("X-Request-Id", "")
    if _REQUEST_ID.fullmatch(given):
        request[REQUEST_ID] = given
    return await handler(request)


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
        if request.path.startswith(_ANTHROPIC_PATH):
            return api_error.response(json.dumps(error_object(api_error)).encode())
        return api_error.response()


@web.middleware
async def _cors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A preflight carries no key, so it is answered before one is asked for."""
    if cors.is_preflight(request) and request.app[SERVICE].config.cors_origins:
        return cors.preflight(request)
    return await handler(request)
