"""What would hold up the event loop: done in a few threads beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from pshare_jax.errors import QueueFullError

P = ParamSpec("P")
T = TypeVar("T")

# What is smaller is done at once: a thread costs a tenth of a millisecond.
INLINE_BYTES = 16 * 1024


# Each may hold a body of some megabytes.
MAX_WAITING = 512


class Offload:
    """A bounded pool of threads. Tasks wait for their turn in the order they come."""

    def __init__(self, threads: int):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="serve")
        self._tasks = 0

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`work(*args, **kwargs)`, in a thread. A caller that is cancelled leaves a task that has
        begun to its end.

        Raises:
            QueueFullError: too many wait.
        """
        if self._tasks >= MAX_WAITING:
            raise QueueFullError(f"{self._tasks} requests wait to be read; try again later")
        self._tasks += 1
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._pool, lambda: work(*args, **kwargs))
        future.add_done_callback(self._forget)
        return await future

    def _forget(self, _: object) -> None:
        self._tasks -= 1

    async def run_if(
        self, large: bool, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`work(*args, **kwargs)`: in a thread if it is `large`, else at once."""
        if large:
            return await self.run(work, *args, **kwargs)
        return work(*args, **kwargs)

    def close(self) -> None:
        """Drops what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)
