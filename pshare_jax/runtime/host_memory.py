"""What becomes of freed memory: whether the C library keeps it from the operating system."""

from __future__ import annotations

import ctypes
import importlib.util
import os

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
"""Parameters of `mallopt` (glibc)."""


def return_freed_memory() -> None:
    """Gives freed memory back to the operating system, as far as the C library can.

    For after large temporary arrays and after compilation: of what start-up frees, glibc keeps
    hundreds of megabytes for later allocations, which serving does not make.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def computes_on_cpus() -> bool:
    """Whether JAX will take the host's CPUs, as far as is known before it starts.

    By `JAX_PLATFORMS`, or, without it, because nothing for another platform is installed.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0].strip() == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def keep_freed_memory() -> bool:
    """Makes this process keep what it frees, for arrays to come; before XLA starts its threads.

    For training: XLA on CPUs takes the temporary memory of a computation from `malloc` and frees it
    at its end. glibc returns so large a piece, and the next step pays for every page of it again,
    0.4 to 1.2 s a gigabyte in a virtual machine. With this, large pieces come from the one heap,
    not from mappings of their own, and its end is not returned; the heap is one for all threads,
    since others' could not hold such pieces.

    Returns:
        Whether it does: it is a matter of glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _ARENA_MAX: 1}
    return all(mallopt(name, value) for name, value in settings.items())
