"""How much a refusal may cost, and how many random attacks are made."""

from __future__ import annotations

import contextlib
import os
import time
import tracemalloc
from collections.abc import Iterator

SEEDS = range(int(os.environ.get("ATTACK_SEEDS", "3")))
"""Each is one deterministic series of attacks; `make attack` makes more of them."""

SECONDS = 1.0
MEGABYTES = 64


@contextlib.contextmanager
def cheap() -> Iterator[None]:
    """What happens in the block takes at most `SECONDS` of processor time and `MEGABYTES` of heap.

    Heap is what Python and numpy allocate.
    """
    tracemalloc.start()
    started = time.process_time()
    try:
        yield
        seconds = time.process_time() - started
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seconds <= SECONDS
    assert peak <= MEGABYTES << 20
