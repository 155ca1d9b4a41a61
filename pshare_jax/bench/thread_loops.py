"""The thread loop of `kernels/native/src/threads.h` in virtual time, for any number of threads.

What a loop's iterations are and what each takes comes from a trace, cut by the kernels themselves.
Here is only who takes which iteration when: in order, each by the thread that is free first. A
step on memory that threads share takes as long as the line needs from one core to another, and
such steps on one line come one after the other.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class _Line:
    """A line of memory that one core has at a time.

    Args:
        seconds: from one core to another.
        free: when it can be had next.
        owner: the thread that has it.
    """

    seconds: float
    free: float = 0.0
    owner: int = -1

    def step(self, now: float, thread: int) -> float:
        """When a step of `thread` on it, begun now, is done."""
        begin = max(now, self.free)
        if self.owner != thread:
            begin += self.seconds
        self.owner, self.free = thread, begin
        return begin


def loop_seconds(iterations: Sequence[float], threads: int, line_seconds: float) -> float:
    """What a loop takes its caller, from opening the gate until all workers have left.

    Args:
        iterations: seconds of each.
        threads: of the team.
        line_seconds: a line's way from one core to another.
    """
    helpers = min(len(iterations), threads) - 1
    if helpers <= 0:
        return float(sum(iterations))
    gate, counter = _Line(line_seconds), _Line(line_seconds)
    opened = gate.step(0.0, 0)
    # When each thread wants its next iteration. A worker sees the gate first, and then enters it.
    asks = [(opened, 0)]
    asks += [(gate.step(opened + line_seconds, thread), thread) for thread in range(1, helpers + 1)]
    heapq.heapify(asks)
    taken, ends = 0, []
    while asks:
        now, thread = heapq.heappop(asks)
        now = counter.step(now, thread)
        if taken < len(iterations):
            heapq.heappush(asks, (now + iterations[taken], thread))
            taken += 1
        else:
            ends.append((now, thread))
    ended = max(gate.step(now, thread) for now, thread in ends)
    # The caller waits until it sees the last one's step.
    return ended + (line_seconds if gate.owner != 0 else 0.0)
