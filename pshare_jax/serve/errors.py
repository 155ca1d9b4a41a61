"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
from http import HTTPStatus

import msgspec
from aiohttp import web

from pshare_jax.errors import (
    EngineDeadError,
    QueueFullError,
    RequestError,
    UnknownModelError,
)

_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}


class ApiError(Exception):
    """An answer other than success; `headers` go with the response."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        close: bool = False,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}
        self.close = close

    def as_dict(self) -> dict[str, str | None]:
        """The error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "message": self.message,
            "type": _TYPES.get(HTTPStatus(self.status), kind),
            "param": self.param,
            "code": self.code,
        }

    def body(self) -> bytes:
        """The error object as JSON."""
        return msgspec.json.encode({"error": self.as_dict()})

    def response(
        self, body: bytes | None = None, kind: type[web.Response] = web.Response
    ) -> web.Response:
        """The whole answer; `body` is the error object in another shape than OpenAI's."""
        response = kind(
            status=self.status,
            body=self.body() if body is None else body,
            content_type="application/json",
            headers=self.headers,
        )
        if self.close:
            response.force_close()
        return response


class GenerationError(Exception):
    """A sequence that the engine gave up, for a reason that is not the client's."""


def as_api_error(error: Exception) -> ApiError | None:
    """What the client is told about `error`; None for one that nobody expected."""
    match error:
        case ApiError():
            return error
        case UnknownModelError():
            return ApiError(404, str(error), param="model", code="model_not_found")
        case RequestError():
            return ApiError(400, str(error), param=error.param, code=error.code)
        case QueueFullError():
            seconds = str(max(1, math.ceil(error.retry_after)))
            return ApiError(
                429, str(error), code="rate_limit_exceeded", headers={"Retry-After": seconds}
            )
        case EngineDeadError():
            return ApiError(503, str(error), code="engine_dead")
        case GenerationError():
            return ApiError(500, str(error), code="generation_failed")
        case RecursionError():  # nothing here recurses but over what clients send
            return ApiError(400, "the request is nested too deeply", code="nested_too_deeply")
        case web.HTTPException():
            return _from_http_exception(error)
        case _:
            return None


def _from_http_exception(error: web.HTTPException) -> ApiError:
    message, code, headers = error.reason, None, {}
    if isinstance(error, web.HTTPNotFound):
        message, code = "no such path; the API lives under /v1", "not_found"
    elif isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        message = f"method {error.method} is not allowed here; use {allowed}"
        code, headers = "method_not_allowed", {"Allow": allowed}
    elif isinstance(error, web.HTTPRequestEntityTooLarge):
        message, code = "the request body is larger than the server accepts", "body_too_large"
    return ApiError(error.status, message, code=code, headers=headers)
