"""What has come to a worker from other processes, counted."""

from __future__ import annotations

import threading
from collections import Counter


class Traffic:
    """What has come to a worker from other processes. Thread-safe.

    Attributes:
        raw: bytes of pages, as they are in a pool, by way and codec.
        wire: bytes that came for them.
        refused: coded transfers that were not what they should be, by reason.
    """

    def __init__(self) -> None:
        self.raw: Counter[tuple[str, str]] = Counter()
        self.wire: Counter[tuple[str, str]] = Counter()
        self.refused: Counter[str] = Counter()
        self._lock = threading.Lock()

    def came(self, way: str, codec: str, raw: int, wire: int) -> None:
        """Counts a transfer."""
        with self._lock:
            self.raw[way, codec] += raw
            self.wire[way, codec] += wire

    def refuse(self, reason: str) -> None:
        """Counts a coded transfer that nothing was taken of."""
        with self._lock:
            self.refused[reason] += 1
