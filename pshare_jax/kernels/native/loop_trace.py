"""What the loops of the C++ kernels cost, iteration by iteration, as `src/trace.h` keeps it.

While a trace is kept calls run on one thread, but are cut as for another number of threads. So how
work is shared out is told by the code that shares it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from pshare_jax.errors import ConfigError
from pshare_jax.kernels.native.library import require_library

_ENTRY = np.dtype([("begin", "i8"), ("end", "i8"), ("stage", "i4"), ("count", "i4")])
_CALL = -2
_NANO = 1e-9


@dataclass(frozen=True)
class Loop:
    """A loop of a call.

    Args:
        stage: what it is for.
        seconds: of each iteration, in order.
        begin: seconds, from any start.
        end: the same.
    """

    stage: str
    seconds: np.ndarray
    begin: float
    end: float


@dataclass(frozen=True)
class Call:
    """A call of a kernel: its loops, and seconds, from any start, when it began and ended."""

    loops: Sequence[Loop]
    begin: float
    end: float


@dataclass
class Trace:
    """Calls, in order; there are none before the trace has ended."""

    calls: list[Call] = field(default_factory=list)


@contextmanager
def traced(threads: int) -> Iterator[Trace]:
    """Traces the calls of this process, in all threads, cut as for a team of `threads`.

    Raises:
        ConfigError: `threads` is less than 1, or there is no C++ library on this machine.
    """
    if threads < 1:
        raise ConfigError(f"threads is {threads}: a team has at least 1")
    library = require_library()
    trace = Trace()
    library.start_trace(threads)
    try:
        yield trace
    finally:
        entries, stages = library.end_trace(_ENTRY)
        trace.calls += _calls(entries, stages)


def _calls(entries: np.ndarray, stages: Sequence[str]) -> Iterator[Call]:
    loops: list[Loop] = []
    at = 0
    while at < len(entries):
        entry = entries[at]
        begin, end = _NANO * int(entry["begin"]), _NANO * int(entry["end"])
        if entry["count"] == _CALL:
            yield Call(tuple(loops), begin, end)
            loops, count = [], 0
        else:
            count = int(entry["count"])
            items = entries[at + 1 : at + 1 + count]
            loops.append(
                Loop(
                    stages[int(entry["stage"])], _NANO * (items["end"] - items["begin"]), begin, end
                )
            )
        at += 1 + count
