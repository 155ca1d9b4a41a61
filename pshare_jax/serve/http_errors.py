"""Errors that come before routing (a request line or header that cannot be read), as JSON too."""

from __future__ import annotations

import logging
import uuid
from typing import Any

from aiohttp import http_exceptions, web
from aiohttp.web_protocol import RequestHandler

from pshare_jax.serve.errors import ApiError

log = logging.getLogger(__name__)

_TOO_LARGE = ("too many headers", "too long", "got more than")


class JsonErrors(RequestHandler):
    """aiohttp's protocol of one connection, but for the shape of errors that it finds itself."""

    __slots__ = ("_server_header",)

    def __init__(self, server: web.Server, server_header: str, **kwargs: Any):
        super().__init__(server, **kwargs)
        self._server_header = server_header

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to a request that no handler sees; closes the connection.

        Raises:
            ConnectionError: an answer has begun already.
        """
        if isinstance(exc, ConnectionError):
            raise exc  # the client has gone: nobody is left to be told
        if status >= 500:
            log.error("a bug while handling a request", exc_info=exc)
        else:
            log.info("not HTTP from %s: %s", request.remote, _first_line(exc, message))
        if request.writer.output_size > 0:
            raise ConnectionError("the response has begun; an error cannot be sent any more")
        response = _api_error(status, exc, message).response(kind=LoggedError)
        response.headers["Server"] = self._server_header
        response.headers["X-Request-Id"] = f"req-{uuid.uuid4().hex}"
        return response


class JsonRunner(web.AppRunner):
    """Runs an application with `JsonErrors` as the protocol of its connections."""

    def __init__(self, app: web.Application, server_header: str = "", **kwargs: Any):
        super().__init__(app, **kwargs)
        self._protocol_kwargs: dict[str, Any] = {"server_header": server_header, **self._kwargs}

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        return _JsonServer(
            server.request_handler, request_factory=server.request_factory, **self._protocol_kwargs
        )


class LoggedError(web.Response):
    """A response that no handler has made, nor an application's hook sees; why has been logged."""

    async def _prepare_headers(self) -> None:
        await super()._prepare_headers()
        if not self.headers["Server"]:
            del self.headers["Server"]


class _JsonServer(web.Server):
    def __call__(self) -> RequestHandler:
        return JsonErrors(self, loop=self._loop, **self._kwargs)


def _api_error(status: int, exc: BaseException | None, message: str | None) -> ApiError:
    if status >= 500:
        return ApiError(500, "internal error", code="internal_error", close=True)
    reason = _first_line(exc, message)
    if isinstance(exc, http_exceptions.LineTooLong) or any(
        part in reason.lower() for part in _TOO_LARGE
    ):
        return ApiError(
            431,
            "the request line or the headers are larger than the server accepts",
            code="headers_too_large",
            close=True,
        )
    return ApiError(400, f"not a valid HTTP request: {reason}", code="invalid_http", close=True)


def _first_line(exc: BaseException | None, message: str | None) -> str:
    """What the parser said, without the client's bytes that it quotes in further lines."""
    lines = (message or str(exc) or "it cannot be parsed").strip().splitlines()
    return ascii(lines[0].rstrip(":")[:200])[1:-1]
