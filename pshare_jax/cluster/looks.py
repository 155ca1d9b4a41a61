"""What the pools of worker processes hold, for a frontend whose page somebody watches.

A frontend asks when it looks, which it does rarely enough to take a hundredth of a core; so does
each worker process, whoever asks. What has not changed is not sent again, and is read by the
frontend where its look is timed.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from pshare_jax.core.pages.sharing_map import PoolView

SHARE = 0.01
"""Most of one core's time that a worker process may look at its pools."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[PoolView])


class PoolLooks:
    """A worker process's side. Belongs to one event loop.

    Args:
        look: gives the pools; called in another thread.
        clock: seconds, from any start.

    Attributes:
        number: of the newest contents, from 1; 0 before anybody has looked.
        data: these, encoded.
    """

    def __init__(
        self, look: Callable[[], Sequence[PoolView]], clock: Callable[[], float] = time.monotonic
    ):
        self.number = 0
        self.data: bytes = b""
        self._look = look
        self._clock = clock
        self._not_before = clock()
        self._looking = asyncio.Lock()

    async def newest(self) -> None:
        """Looks, unless that was done a moment ago."""
        async with self._looking:
            if self._clock() < self._not_before:
                return
            data, seconds = await asyncio.to_thread(self._encoded)
            self._not_before = self._clock() + seconds / SHARE
            if data != self.data:
                self.number, self.data = self.number + 1, data

    def _encoded(self) -> tuple[bytes, float]:
        started = time.thread_time()
        data = _encoder.encode(list(self._look()))
        return data, time.thread_time() - started


@dataclass(eq=False)
class _Seen:
    """What a process has told; `views` once that was read. Another answer is another object."""

    number: int = 0
    data: bytes = b""
    views: list[PoolView] | None = None
    asked: bool = False


class SeenPools:
    """A frontend's side. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str, _Seen] = {}

    def ask(self, address: str) -> int | None:
        """What a worker process is to be told that is known of it; None if it has yet to answer."""
        with self._lock:
            seen = self._seen.setdefault(address, _Seen())
            if seen.asked:
                return None
            seen.asked = True
            return seen.number

    def hear(self, address: str, number: int, data: bytes) -> None:
        """A worker process answers; without data nothing has changed."""
        with self._lock:
            if data:
                self._seen[address] = _Seen(number, data)
            elif address in self._seen:
                self._seen[address].asked = False

    def lose(self, address: str) -> None:
        """A link has ended: pools are gone, or will be told of again."""
        with self._lock:
            self._seen.pop(address, None)

    def views(self) -> list[PoolView]:
        """All pools, as they were told of last; reads what has not been read."""
        with self._lock:
            known = list(self._seen.values())
        found: list[PoolView] = []
        for seen in known:
            if seen.views is None:
                seen.views = _decoder.decode(seen.data) if seen.data else []
            found += seen.views
        return found
