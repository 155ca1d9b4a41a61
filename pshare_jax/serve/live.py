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
from pshare_jax.core.stats import EngineStats, TierStats
from pshare_jax.errors import QueueFullError
from pshare_jax.serve.engine_api import Engine
from pshare_jax.serve.offload import Offload
from pshare_jax.serve.session_log import SessionLog

log = logging.getLogger(__name__)

SHARE = 0.01
"""Most of one core's time that looking and encoding may take."""

INTERVAL_SECONDS = 0.5
"""Between two looks, at least."""

MAX_WATCHERS = 16


@dataclass(frozen=True)
class _Look:
    """What was seen, as JSON. `changed` has events that are sent when they have changed: each with
    the number of the look that first saw it so."""

    number: int
    state: bytes
    changed: tuple[tuple[bytes, int], ...]


class Live:
    """Events of one engine. Belongs to one event loop.

    Args:
        engine: who is watched.
        offload: threads for the looking.
        sessions: of the server.
    """

    def __init__(self, engine: Engine, offload: Offload, sessions: SessionLog):
        self._engine = engine
        self._sessions = sessions
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

        `state` comes with every look, `map` and `sessions` with the first and when they have
        changed. A slow watcher misses looks, and gets the newest. Ends when the server drains.

        Raises:
            QueueFullError: too many watch.
        """
        if self._watchers >= MAX_WATCHERS:
            raise QueueFullError(f"{self._watchers} pages watch already; try again later")
        self._watchers += 1
        try:
            if self._task is None:
                self._task = asyncio.create_task(self._run())
            number = 0
            while (look := await self._newer_than(number)) is not None:
                seen, number = number, look.number
                yield [look.state, *(event for event, since in look.changed if since > seen)]
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
        events = (
            _map_event(self._engine.sharing_map()),
            {"type": "sessions", "sessions": self._sessions.newest()},
        )
        number = last.number + 1 if last else 1
        before = dict(last.changed) if last else {}
        encoded = [msgspec.json.encode(event) for event in events]
        changed = tuple((event, before.get(event, number)) for event in encoded)
        return _Look(number, state, changed), time.thread_time() - started


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
                "failed_transfers": stats.failed_transfers.get(name, 0),
            }
            for name, pool in stats.pools.items()
        },
        "tiers": {name: _tier(tier) for name, tier in stats.tiers.items()},
    }


def _tier(tier: TierStats) -> dict[str, Any]:
    return {
        "slots": tier.slots,
        "hits": tier.hits,
        "missed": sum(tier.missed.values()),
        "stored": tier.stored,
        "refused": sum(tier.refused.values()),
        "bytes_read": tier.bytes_read,
        "bytes_written": tier.bytes_written,
        "raw_bytes_written": tier.raw_bytes_written,
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
