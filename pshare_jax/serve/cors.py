"""Cross-origin requests: pages of configured origins may call the API from a browser.

Source: the Fetch standard, https://fetch.spec.whatwg.org/#http-cors-protocol
"""

from __future__ import annotations

import re
from collections.abc import Collection

from aiohttp import web

_LIMITS = [
    f"x-ratelimit-{what}-{unit}"
    for unit in ("requests", "tokens")
    for what in ("limit", "remaining", "reset")
]
_EXPOSED = ", ".join(["X-Request-Id", "Retry-After", "Warnings", *_LIMITS])
_METHODS = "GET, HEAD, POST, OPTIONS"
_MAX_AGE_SECONDS = "86400"
_NAMES = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+(?:[ \t]*,[ \t]*[!#$%&'*+.^_`|~0-9A-Za-z-]+)*")


def is_preflight(request: web.Request) -> bool:
    """Whether a browser asks before it sends the real request."""
    return (
        request.method == "OPTIONS"
        and "Origin" in request.headers
        and "Access-Control-Request-Method" in request.headers
    )


def preflight(request: web.Request) -> web.Response:
    """The answer to a preflight: everything that the API has, whatever the path."""
    headers = {
        "Access-Control-Allow-Methods": _METHODS,
        "Access-Control-Max-Age": _MAX_AGE_SECONDS,
    }
    asked = request.headers.get("Access-Control-Request-Headers", "")
    if _NAMES.fullmatch(asked):  # what a header may not hold cannot be sent back in one
        headers["Access-Control-Allow-Headers"] = asked
    return web.Response(status=204, headers=headers)


def add_headers(
    request: web.BaseRequest, response: web.StreamResponse, origins: Collection[str]
) -> None:
    """Allows the page that asks to read `response`, if its origin is among `origins`.

    The API authenticates with bearer tokens, never with cookies; so credentials are not allowed.
    """
    origin = request.headers.get("Origin")
    if origin is None or not origins:
        return
    response.headers.add("Vary", "Origin")
    if "*" in origins or origin in origins:
        response.headers["Access-Control-Allow-Origin"] = "*" if "*" in origins else origin
        response.headers["Access-Control-Expose-Headers"] = _EXPOSED
