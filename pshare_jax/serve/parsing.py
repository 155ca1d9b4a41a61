"""From the bytes of an HTTP body to a checked request object, or to a clear refusal."""

from __future__ import annotations

import asyncio
import re
from typing import TypeVar

import msgspec
from aiohttp import web

from pshare_jax.serve.errors import ApiError

T = TypeVar("T", bound=msgspec.Struct)

_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`(?: - at `\$\.?(.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*?)`(?: - at `\$\.?(.*)`)?", re.DOTALL)
_INVALID = re.compile(r"(.*?)(?: - at `\$\.?(.*)`)?", re.DOTALL)


async def read_request(request: web.Request, kind: type[T], timeout: float) -> T:
    """Reads the body of `request`, at most `timeout` seconds long, as a `kind`.

    Raises:
        ApiError: 400 for a body that is no such object, 408 for a slow client, 415 for another
            content type.
        web.HTTPRequestEntityTooLarge: the body is over the application's limit.
    """
    if request.content_type != "application/json":
        raise ApiError(
            415,
            f"content type {request.content_type!r} is not accepted; send application/json",
            code="unsupported_media_type",
        )
    limit = request.client_max_size
    if request.content_length is not None and request.content_length > limit:
        raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=request.content_length)
    try:
        async with asyncio.timeout(timeout):
            body = await request.read()
    except TimeoutError:
        raise ApiError(
            408,
            f"the request body did not arrive within {timeout:g} seconds",
            code="request_timeout",
            close=True,
        ) from None
    return parse(body, kind)


def parse(body: bytes, kind: type[T]) -> T:
    """Decodes JSON text.

    Raises:
        ApiError: 400, naming the field at fault as `param`.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from None
    except RecursionError:
        raise _malformed("it is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _malformed(str(error)) from None


def _malformed(reason: str) -> ApiError:
    message = f"We could not parse the JSON body of your request: {reason}"
    return ApiError(400, message, code="invalid_json")


def _refusal(message: str) -> ApiError:
    if match := _UNKNOWN.fullmatch(message):
        name = _join(match[2], match[1])
        return ApiError(
            400, f"Unrecognized request argument supplied: {name}", param=name, code="unknown_field"
        )
    if match := _MISSING.fullmatch(message):
        name = _join(match[2], match[1])
        return ApiError(
            400, f"Missing required parameter: {name}", param=name, code="missing_field"
        )
    match = _INVALID.fullmatch(message)
    assert match is not None
    reason, param = match[1].replace("`", "'"), match[2] or None
    where = f" for {param}" if param else ""
    return ApiError(400, f"Invalid value{where}: {reason}", param=param, code="invalid_type")


def _join(parent: str | None, name: str) -> str:
    return f"{parent}.{name}" if parent else name
