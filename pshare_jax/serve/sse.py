"""Server-sent events over one response, with a limit on how long a client may not read."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import msgspec
from aiohttp import web

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    # Proxies of nginx's kind would otherwise collect the events.
    "X-Accel-Buffering": "no",
}


class WriteTimeout:
    """`async with WriteTimeout(request, seconds)`: a client that does not read is cut off.

    Raises ConnectionResetError, as if the client had gone.
    """

    def __init__(self, request: web.Request, seconds: float):
        self._request = request
        self._timeout = asyncio.timeout(seconds)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            if self._request.transport is not None:
                _reset(self._request.transport)
            raise ConnectionResetError("the client does not read its answer") from None


def _reset(transport: asyncio.Transport) -> None:
    # An ordinary close would leave the kernel to offer the rest to the client for minutes.
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


class EventStream:
    """Collects events and sends them together.

    Args:
        request: whose answer they are.
        write_timeout: how long the client may not read, in seconds.
        named: whether events that are mappings are named by their `type`.
    """

    def __init__(self, request: web.Request, write_timeout: float, named: bool = False):
        self._request = request
        self._seconds = write_timeout
        self._encoder = msgspec.json.Encoder()
        self._pending = bytearray()
        self._named = named
        self.response = web.StreamResponse(headers=_HEADERS)

    def add(self, event: msgspec.Struct | Mapping[str, Any] | bytes, id: str | None = None) -> None:
        """Queues `event` as JSON, under an `id` if it has one; bytes are encoded already."""
        if id is not None:
            self._pending += b"id: %s\n" % id.encode()
        if self._named and isinstance(event, Mapping):
            self._pending += b"event: %s\n" % event["type"].encode()
        self._pending += b"data: "
        self._pending += event if isinstance(event, bytes) else self._encoder.encode(event)
        self._pending += b"\n\n"

    def add_comment(self) -> None:
        """Queues a line that clients skip, so that they and proxies see that somebody is there."""
        self._pending += b": ping\n\n"

    async def flush(self) -> None:
        """Sends what is queued.

        Raises:
            ConnectionError: the client has gone, or does not read.
        """
        if not self._pending:
            return
        data, self._pending = bytes(self._pending), bytearray()
        async with WriteTimeout(self._request, self._seconds):
            await self.response.write(data)

    async def open(self) -> None:
        """Sends the headers."""
        async with WriteTimeout(self._request, self._seconds):
            await self.response.prepare(self._request)
