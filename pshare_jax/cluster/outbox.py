"""Frames on their way out over a websocket: put from any thread, sent together by a loop's task."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from pshare_jax.cluster.wire import Frame, encode

BATCH = 256
"""Frames that are sent as one websocket message, at most."""

SEND_SECONDS = 30.0
"""How long the other side may not read what it is sent; then the link ends."""


class Socket(Protocol):
    """An aiohttp websocket, of either side."""

    async def send_bytes(self, data: bytes) -> None:
        """Sends a message; waits while the other side does not read."""
        ...


class FrameQueue:
    """Frames for one websocket, in order. Belongs to one event loop; `put` is for any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._frames: deque[Frame] = deque()
        self._wakeup = asyncio.Event()
        self._scheduled = False

    def put(self, frame: Frame) -> None:
        """Has a frame sent; never blocks. Frames for a link that has ended are lost with it."""
        self._frames.append(frame)
        if not self._scheduled:
            self._scheduled = True
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:  # the loop is closed
                self._frames.clear()

    async def send_to(self, socket: Socket) -> None:
        """Sends frames until that fails.

        Raises:
            ConnectionError: the link has ended.
            TimeoutError: the other side does not read.
        """
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            while self._frames:
                count = min(len(self._frames), BATCH)
                data = encode([self._frames.popleft() for _ in range(count)])
                async with asyncio.timeout(SEND_SECONDS):
                    await socket.send_bytes(data)

    def _wake(self) -> None:
        # Cleared first: a frame that is put from now on either is seen or wakes again.
        self._scheduled = False
        self._wakeup.set()
