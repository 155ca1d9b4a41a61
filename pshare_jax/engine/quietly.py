"""Work that others hardly notice: on processors only when nobody else wants them."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

NICENESS = 10
"""Of a thread that computes quietly: it gets a tenth of a processor that others want all of. Not
the most there is: who waits for the interpreter that such a thread is about to take waits for it to
get a processor."""

SWITCH_SECONDS = 0.0005
"""After which the interpreter is handed on while modules are loaded. A decode step gives it away
and wants it back several times."""


def at_once(function: Callable[..., T], *arguments: Any) -> T:
    """Calls `function`."""
    return function(*arguments)


def quietly(function: Callable[..., T], *arguments: Any) -> T:
    """Calls `function` in a thread of little priority, and waits for it.

    For what computes without the interpreter, such as numpy on large arrays. Where threads have no
    priorities of their own (elsewhere than on Linux) it is as any other thread.

    Raises:
        Whatever `function` raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        # A thread's own, and only ever more: so the thread is one of its own, too.
        if sys.platform == "linux":
            thread = threading.get_native_id()
            niceness = max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread))
            os.setpriority(os.PRIO_PROCESS, thread, niceness)
        try:
            results.append(function(*arguments))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="quiet", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def handing_on() -> Iterator[None]:
    """Has threads that run Python hand the interpreter on soon; for one user at a time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
