"""How an op finds its implementation: a table of backends and one rule for `auto`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

F = TypeVar("F")


def select_backend(op: str, backends: Mapping[str, F], backend: str) -> F:
    """The implementation of `op` called `backend`; `auto` is the first entry of the table.

    The choice is made at trace time from the name alone, never from the running device, so that
    a function can be compiled for hardware that is not there.

    Raises:
        ValueError: no backend of that name; the message lists those there are.
    """
    if backend == "auto":
        return next(iter(backends.values()))
    try:
        return backends[backend]
    except KeyError:
        names = ", ".join(["auto", *backends])
        raise ValueError(f"{op}: unknown backend {backend!r}; choose one of {names}") from None
