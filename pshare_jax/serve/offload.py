"""What would hold up the event loop: done in a few threads beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from aiohttp import web

from pshare_jax.errors import QueueFullError

P = ParamSpec("P")
T = TypeVar("T")

# What is smaller is done at once: a thread costs a tenth of a millisecond.
INLINE_BYTES = 16 * 1024
# Each may hold a body of some megabytes.
MAX_WAITING = 512


class Offload:
    """Threads for work of requests. Tasks wait for their turn in the order they come.

    Work of large requests has threads of its own, so that those who send them wait for each other,
    and nobody else for them; and so have grammars that nobody knows yet.
    """

    def __init__(self, threads: int):
        self._small = _Pool(threads, "small")
        self._large = _Pool(threads, "large")
        self._grammars = _Pool(threads, "grammars")

    async def run(self, large: bool, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`work(*args, **kwargs)`, in a thread for `large` work or for small.

        A caller that is cancelled leaves a task that has begun to its end.

        Raises:
            QueueFullError: too many wait.
        """
        pool = self._large if large else self._small
        return await pool.run(lambda: work(*args, **kwargs))

    async def run_if(
        self, large: bool, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`work(*args, **kwargs)`: in a thread if it is `large`, else at once."""
        if large:
            return await self.run(True, work, *args, **kwargs)
        return work(*args, **kwargs)

    async def compile(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`work(*args, **kwargs)`, which compiles a grammar: it may take seconds.

        Raises:
            QueueFullError: too many wait.
        """
        return await self._grammars.run(lambda: work(*args, **kwargs))

    def close(self) -> None:
        """Drops what has not begun."""
        for pool in (self._small, self._large, self._grammars):
            pool.close()


class _Pool:
    def __init__(self, threads: int, name: str):
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=f"serve-{name}")
        self._tasks = 0

    async def run(self, work: Callable[[], T]) -> T:
        if self._tasks >= MAX_WAITING:
            raise QueueFullError(f"{self._tasks} requests wait to be read; try again later")
        self._tasks += 1
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        future.add_done_callback(self._forget)
        return await future

    def _forget(self, _: object) -> None:
        self._tasks -= 1

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def is_large(request: web.Request) -> bool:
    """Whether a request's body is large, or of unknown size."""
    length = request.content_length
    return length is None or length > INLINE_BYTES or "Content-Encoding" in request.headers
