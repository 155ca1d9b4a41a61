"""When a mesh that may do either had better do the other: a rule with memory, and no clock.

Prefill lacks meshes while more prompt tokens wait at each prefill worker than a mesh computes in a
while, and one decode worker less has slots for all sequences. Decode lacks them when next to
nothing waits for prefill and its slots are half full. Either has to last for some time, and then
nothing changes for longer, so that meshes do not go to and fro.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LASTING_SECONDS = 1.0
"""How long a lack must last before a mesh is given."""

REST_SECONDS = 5.0
"""After a mesh was given nothing changes for so long."""


@dataclass(frozen=True)
class BalancePolicy:
    """When meshes change.

    Args:
        backlog: prompt tokens that wait at each prefill worker when prefill lacks a mesh.
        slots: sequences that a decode worker has room for.
    """

    backlog: int
    slots: int


class Balancer:
    """Decides; all times are in seconds, from any start.

    Args:
        policy: when meshes change.
    """

    def __init__(self, policy: BalancePolicy):
        self._policy = policy
        self._lacking: str = ""
        self._since = 0.0
        self._rests_until = 0.0

    def decide(
        self, waiting: Mapping[str, int], sequences: Mapping[str, int], now: float
    ) -> str | None:
        """The worker whose mesh had better be given to its twin, or None.

        Args:
            waiting: prompt tokens that wait, by prefill worker that works.
            sequences: covered ones, by decode worker that works.
            now: seconds.
        """
        lacking = self._lacks(waiting, sequences)
        if lacking != self._lacking:
            self._lacking, self._since = lacking, now
        if not lacking or now < max(self._since + LASTING_SECONDS, self._rests_until):
            return None
        self._rests_until = now + REST_SECONDS
        givers = sequences if lacking == "prefill" else waiting
        return min(givers, key=lambda name: givers[name])

    def _lacks(self, waiting: Mapping[str, int], sequences: Mapping[str, int]) -> str:
        tokens, rows = sum(waiting.values()), sum(sequences.values())
        policy = self._policy
        if tokens > policy.backlog * len(waiting) and len(sequences) > 1:
            return "prefill" if rows <= policy.slots * (len(sequences) - 1) else ""
        if tokens <= policy.backlog // 8 and len(waiting) > 1:
            return "decode" if 2 * rows > policy.slots * len(sequences) else ""
        return ""
