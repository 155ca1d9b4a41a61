"""Long work on the event loop, in turns with everybody else's."""

from __future__ import annotations

import asyncio
import time

TURN_SECONDS = 0.005


class Turn:
    """Work of one task; `pause` lets others of the loop in when it has had its time."""

    def __init__(self) -> None:
        self._end = time.monotonic() + TURN_SECONDS

    async def pause(self) -> None:
        """Goes on at once, or after one round of the loop."""
        if time.monotonic() > self._end:
            await asyncio.sleep(0)
            self._end = time.monotonic() + TURN_SECONDS
