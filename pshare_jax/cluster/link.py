"""A frontend's side of its links: one to each worker process, made again whenever it ends.

A link ends when the connection does, or when the worker's engine has given no sign of life for too
long. What was sent over it counts as lost from then on: who comes at the same address afterwards is
somebody else, even if it is the same process, and whatever is still heard of the old is dropped by
the ids of attempts.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
import msgspec

from pshare_jax.cluster import wire
from pshare_jax.cluster.outbox import FrameQueue

logger = logging.getLogger(__name__)

AGAIN_SECONDS = 0.25
"""Between two attempts to link, at first; each further one waits twice as long, up to a limit."""

MAX_AGAIN_SECONDS = 2.0

PIECES = 3.0
"""A worker may be silent for as many times its longest piece of work, up to a limit."""

MAX_SILENT_SECONDS = 60.0


@dataclass(frozen=True)
class LinkTimes:
    """How patient a link is.

    Args:
        hello_seconds: for a connection and an answer to the hello.
        beat_seconds: how often it is looked whether the worker gives signs of life.
        lost_seconds: after this without one the worker is lost, unless its work takes longer.
    """

    hello_seconds: float = 10.0
    beat_seconds: float = 0.25
    lost_seconds: float = 5.0


class LinkLostError(Exception):
    """A link has ended; says why."""


class Link:
    """The link to the worker process at one address. Belongs to one event loop.

    Args:
        address: `HOST:PORT`.
        hello: who we are.
        token: that the processes of the cluster know each other by; empty is none.
        tls: who we are and whom we believe; None is plain HTTP.
        times: how patient it is.
        on_join: called with the link once it is welcome; may raise LinkLostError.
        on_frame: called with each frame.
        on_lost: called with the reason when it ends after it was welcome.

    Attributes:
        welcome: what the worker process said of itself; None while there is no link.
        last: its last sign of life, which says what it has done.
        why: why there is no link.
    """

    def __init__(
        self,
        address: str,
        hello: wire.Hello,
        token: str,
        tls: ssl.SSLContext | None,
        times: LinkTimes,
        on_join: Callable[[Link], None],
        on_frame: Callable[[Link, wire.Frame], None],
        on_lost: Callable[[Link, str], None],
    ):
        self.address = address
        self.welcome: wire.Welcome | None = None
        self.last: wire.Beat | None = None
        self.why = "not linked yet"
        self._hello = hello
        self._token = token
        self._tls = tls
        self._times = times
        self._on_join = on_join
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._queue: FrameQueue | None = None
        self._beaten = False

    def send(self, frame: wire.Frame) -> None:
        """Sends a frame, from any thread; without a link it is lost."""
        queue = self._queue
        if queue is not None:
            queue.put(frame)

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Keeps the link up until it is cancelled."""
        seconds = AGAIN_SECONDS
        while True:
            reason = "the connection has ended"
            try:
                await self._link(session)
            except (aiohttp.ClientError, OSError, TimeoutError, LinkLostError) as error:
                reason = str(error) or type(error).__name__
            if self.welcome is not None:
                seconds = AGAIN_SECONDS
                self._end(reason)
            elif reason != self.why:
                logger.info("no link to %s: %s", self.address, reason)
            self.why = reason
            await asyncio.sleep(seconds)
            seconds = min(2 * seconds, MAX_AGAIN_SECONDS)

    def cut(self, reason: str) -> None:
        """Ends the link for good: what `run` did is undone, and it is to be cancelled."""
        self.why = reason
        if self.welcome is not None:
            self._end(reason)

    def _end(self, reason: str) -> None:
        logger.warning("lost %s: %s", self.address, reason)
        self._queue = None
        self._on_lost(self, reason)
        self.welcome, self.last = None, None

    async def _link(self, session: aiohttp.ClientSession) -> None:
        """Makes the link, and stays until it ends; raises why."""
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        async with asyncio.timeout(self._times.hello_seconds):
            socket = await session.ws_connect(
                f"{'https' if self._tls else 'http'}://{self.address}{wire.PATH}",
                headers=headers,
                ssl=self._tls or True,
                max_msg_size=wire.MAX_FRAME_BYTES,
                compress=0,
            )
        try:
            async with asyncio.timeout(self._times.hello_seconds):
                await socket.send_bytes(wire.encode([self._hello]))
                answer = _frames(await socket.receive())[0]
            if isinstance(answer, wire.Refused):
                raise LinkLostError(f"refused: {answer.reason}")
            if not isinstance(answer, wire.Welcome):
                raise LinkLostError("it has answered the hello with something else")
            self._queue = FrameQueue(asyncio.get_running_loop())
            self.welcome = answer
            self._on_join(self)
            await self._serve(socket, self._queue)
        finally:
            # A process that does not run would not answer a close, either.
            closing = asyncio.ensure_future(socket.close())
            try:
                await asyncio.wait({closing}, timeout=self._times.beat_seconds)
            finally:
                # Also when it is cancelled meanwhile: else the connection outlives us.
                closing.cancel()
                await asyncio.gather(closing, return_exceptions=True)

    async def _serve(self, socket: aiohttp.ClientWebSocketResponse, queue: FrameQueue) -> None:
        tasks = {
            asyncio.create_task(queue.send_to(socket)),
            asyncio.create_task(self._read(socket)),
            asyncio.create_task(self._watch()),
        }
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        done.pop().result()

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            for frame in _frames(await socket.receive()):
                if isinstance(frame, wire.Beat):
                    self._beaten, self.last = True, frame
                self._on_frame(self, frame)

    async def _watch(self) -> None:
        """Raises when the worker gives no sign of life.

        Looks are counted, not seconds: while this process does not run, nobody is late.
        """
        missed, limit = 0, self._times.lost_seconds
        while missed * self._times.beat_seconds < limit:
            self._beaten = False
            await asyncio.sleep(self._times.beat_seconds)
            missed = 0 if self._beaten else missed + 1
            if self.last is not None:
                silent = min(PIECES * self.last.longest_seconds, MAX_SILENT_SECONDS)
                limit = max(self._times.lost_seconds, silent)
        raise LinkLostError(f"no sign of life for {limit:g} s")


def _frames(received: aiohttp.WSMessage) -> list[wire.Frame]:
    """What has come.

    Raises:
        LinkLostError: the end.
    """
    if received.type is not aiohttp.WSMsgType.BINARY:
        raise LinkLostError("the connection has ended")
    try:
        frames = wire.decode(received.data)
    except msgspec.DecodeError as error:
        raise LinkLostError(f"what it says cannot be read: {error}") from error
    if not frames:
        raise LinkLostError("an empty message")
    return frames
