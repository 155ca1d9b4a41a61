"""What the engine is doing, as events for whoever watches.

One task looks at the engine and encodes what it sees; every watcher gets the same bytes. It runs
while somebody watches, and so rarely that it takes at most `SHARE` of one core.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import msgspec

from pshare_jax.core.pages.sharing_map import SharingMap
from pshare_jax.core.stats import EngineStats
from pshare_jax.errors import QueueFullError
from pshare_jax.serve.engine_api import Engine
from pshare_jax.serve.offload import Offload

log = logging.getLogger(__name__)

SHARE = 0.01
"""Most of one core's time that looking and encoding may take."""

INTERVAL_SECONDS = 0.5
"""Between two looks, at least."""

MAX_WATCHERS = 16


@dataclass(frozen=True)
class _Look:
    """What was seen: both as JSON. `map_number` counts the maps that differed from the last."""

    number: int
    state: bytes
    map: bytes
    map_number: int


class Live:
    """Events of one engine. Belongs to one event loop.

    Args:
        engine: who is watched.
        offload: threads for the looking.
    """

    def __init__(self, engine: Engine, offload: Offload):
        self._engine = engine
        self._offload = offload
        self._watchers = 0
        self._task: asyncio.Task[None] | None = None
        self._last: _Look | None = None
        self._next: asyncio.Future[_Look] = asyncio.get_running_loop().create_future()
        self._closed = asyncio.Event()

    def close(self) -> None:
        """Ends what is watched: streams end as if there was nothing more to see."""
        self._closed.set()
        if self._task is not None:
            self._task.cancel()

    async def watch(self) -> AsyncGenerator[list[bytes], None]:
        """The events that a watcher has not seen yet, each JSON with a `type`.

        `state` comes with every look, `map` with the first and when it has changed. A slow watcher
        misses looks, and gets the newest. Ends when the server drains.

        Raises:
            QueueFullError: too many watch.
        """
        if self._watchers >= MAX_WATCHERS:
            raise QueueFullError(f"{self._watchers} pages watch already; try again later")
        self._watchers += 1
        try:
            if self._task is None:
                self._task = asyncio.create_task(self._run())
            number = map_number = 0
            while (look := await self._newer_than(number)) is not None:
                events = [look.state]
                if look.map_number != map_number:
                    events.append(look.map)
                number, map_number = look.number, look.map_number
                yield events
        finally:
            self._watchers -= 1
            if not self._watchers and self._task is not None:
                self._task.cancel()
                # What was seen until now is old for who comes next.
                self._task = self._last = None

    async def _newer_than(self, number: int) -> _Look | None:
        """A look that is newer than that of `number`; None once the server drains."""
        if self._last is None or self._last.number == number:
            closed = asyncio.ensure_future(self._closed.wait())
            await asyncio.wait({closed, self._next}, return_when=asyncio.FIRST_COMPLETED)
            closed.cancel()
        return None if self._closed.is_set() else self._last

    async def _run(self) -> None:
        while True:
            seconds = 0.0
            try:
                self._last, seconds = await self._offload.run(False, self._look, self._last)
                self._next.set_result(self._last)
                self._next = asyncio.get_running_loop().create_future()
            except QueueFullError:
                pass  # others have more need of the threads
            except Exception:
                log.exception("a bug while looking at the engine")
            await asyncio.sleep(max(INTERVAL_SECONDS, seconds / SHARE))

    def _look(self, last: _Look | None) -> tuple[_Look, float]:
        """Looks at the engine; also gives the processor's seconds that it took."""
        started = time.thread_time()
        state = msgspec.json.encode(_state(self._engine))
        sharing = msgspec.json.encode(_map_event(self._engine.sharing_map()))
        number, map_number = (last.number, last.map_number) if last else (0, 0)
        if last is None or sharing != last.map:
            map_number += 1
        look = _Look(number + 1, state, sharing, map_number)
        return look, time.thread_time() - started


def _map_event(sharing: SharingMap) -> dict[str, Any]:
    return {"type": "map", **msgspec.structs.asdict(sharing)}


def _state(engine: Engine) -> dict[str, Any]:
    """Counters that only grow, since the start, and what is so now. `time` is in seconds."""
    stats = engine.stats()
    return {
        "type": "state",
        "time": time.monotonic(),
        "ready": engine.ready,
        "dead": engine.dead,
        "models": {name: _model(stats, name, info) for name, info in engine.models.items()},
        "workers": {
            name: {
                "busy_seconds": stats.busy_seconds.get(name, 0.0),
                "total": pool.total,
                "free": pool.free,
                "used": pool.used,
                "shared": pool.shared,
                "cached": pool.cached,
                "failed": engine.failed_workers.get(name),
            }
            for name, pool in stats.pools.items()
        },
    }


def _model(stats: EngineStats, name: str, info: Any) -> dict[str, Any]:
    tokens = stats.prefill_tokens
    return {
        "sharing": info.sharing,
        "kind": info.kind,
        "running": stats.running.get(name, 0),
        "waiting": stats.waiting.get(name, 0),
        "generated": stats.generation_tokens.get(name, 0),
        "computed": tokens.get((name, "computed"), 0),
        "same_model": tokens.get((name, "same_model"), 0),
        "other_model": tokens.get((name, "other_model"), 0),
        "handoff_pages": stats.handoff_pages.get(name, 0),
        "handoff_bytes": stats.handoff_bytes.get(name, 0),
        "preemptions": stats.preemptions.get(name, 0),
    }
