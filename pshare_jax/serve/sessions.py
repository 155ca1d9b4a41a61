"""What a request says about calls to come: a header, or fields of its body."""

from __future__ import annotations

import math

from aiohttp import web

from pshare_jax.core.requests import Session
from pshare_jax.errors import RequestError
from pshare_jax.frontend.requests import SessionHints
from pshare_jax.serve.service import Service

SESSION_HEADER = "X-Session-Id"
MAX_ID_CHARS = 256


def session_of(request: web.Request, service: Service, hints: SessionHints) -> Session:
    """The session of a request, and its hints.

    Raises:
        RequestError: an id that is too long, or two different ones; a time that is none; a model
            that is not served.
    """
    header, field = request.headers.get(SESSION_HEADER) or None, hints.session_id or None
    if header is not None and field is not None and header != field:
        raise RequestError(
            f"session_id and the header {SESSION_HEADER} differ; give one", param="session_id"
        )
    id = field or header or ""
    if len(id) > MAX_ID_CHARS:
        raise RequestError(
            f"session_id may have at most {MAX_ID_CHARS} characters, got {len(id)}",
            param="session_id",
        )
    ttl = hints.ttl or 0.0
    if not 0.0 <= ttl < math.inf:
        raise RequestError(f"ttl must be a number of seconds, 0 or more, got {ttl}", param="ttl")
    names = tuple(dict.fromkeys(map(service.canonical, hints.next_models or ())))
    unknown = [name for name in names if name not in service.engine.models]
    if unknown:
        served = ", ".join(service.engine.models)
        raise RequestError(
            f"next_models names {unknown[0][:100]!r}, which is not served; served: {served}",
            param="next_models",
        )
    return Session(id, ttl, names)
