"""One line a request: what it cost, and for whom. Never what was asked or answered."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec
from aiohttp import web
from aiohttp.abc import AbstractAccessLogger
from aiohttp.web_log import AccessLogger

from pshare_jax.config import AccessLogFormat
from pshare_jax.core.requests import RequestTimes
from pshare_jax.serve.access import KEY
from pshare_jax.serve.http_errors import LoggedError
from pshare_jax.serve.logs import ACCESS_LOGGER, BARE

TEXT_FORMAT = '%a "%r" %s %b %Tf'
_MAX_PATH = 200


class Report(Protocol):
    """What a request that generates can say of itself."""

    def facts(self) -> Mapping[str, Any]:
        """Model, tokens, time to first token: what its line tells."""
        ...

    def times(self) -> Sequence[tuple[RequestTimes, float]]:
        """When each sequence that has ended came to which stage, and when it ended."""
        ...


REPORT = web.RequestKey("report", Report)


class TextLines(AccessLogger):
    """aiohttp's own lines; requests that are not HTTP have been logged where that was found."""

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """Writes the line of one request."""
        if not isinstance(response, LoggedError):
            super().log(request, response, time)


class JsonLines(AbstractAccessLogger):
    """One JSON object a request, alone on its line."""

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """Writes the line of one request, which took `time` seconds."""
        if isinstance(response, LoggedError):
            return
        report = request.get(REPORT)
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": response.headers.get("X-Request-Id"),
            "remote": request.remote,
            "key": key.name if (key := request.get(KEY)) and key.name else None,
            "method": request.method,
            # It may hold what is no text.
            "path": request.path[:_MAX_PATH].encode(errors="backslashreplace").decode(),
            "status": response.status,
            "bytes": response.body_length,
            "seconds": round(time, 6),
            **(report.facts() if report else {}),
        }
        self.logger.info("%s", msgspec.json.encode(line).decode(), extra={BARE: True})


def access_log_options(kind: AccessLogFormat) -> dict[str, Any]:
    """What a runner needs to be told to write lines of that kind."""
    if kind == "off":
        return {"access_log": None}
    return {
        "access_log": logging.getLogger(ACCESS_LOGGER),
        "access_log_class": TextLines if kind == "text" else JsonLines,
        "access_log_format": TEXT_FORMAT,
    }
