"""Python's lock, where a thread loads modules beside those that serve."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH_SECONDS = 0.0005
"""After which the lock is handed on while modules are loaded. A decode step gives it away and wants
it back several times."""


@contextmanager
def handing_on() -> Iterator[None]:
    """Has threads that run Python hand the lock on soon; for one user at a time.

    No thread gets a lower priority: while it is put aside with the lock in its hand, all wait.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
