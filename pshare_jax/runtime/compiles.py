"""Counts XLA compilations of this process, so that serving can prove that it does none."""

from __future__ import annotations

import threading

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_lock = threading.Lock()
_count = 0
_listening = False


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del duration_secs, kwargs
    global _count
    if event == _COMPILE_EVENT:
        with _lock:
            _count += 1


def compile_count() -> int:
    """Compilations (or loads from the persistent cache) since the first call of this function."""
    global _listening
    with _lock:
        if not _listening:
            jax.monitoring.register_event_duration_secs_listener(_listen)
            _listening = True
    return _count
