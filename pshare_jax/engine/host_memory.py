"""Memory that was freed, but that the C library keeps from the operating system."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Gives freed memory back to the operating system, as far as the C library can.

    For after large temporary arrays and after compilation: of what start-up frees, glibc keeps
    hundreds of megabytes for later allocations, which serving does not make.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
