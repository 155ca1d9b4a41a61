"""Programs are lowered in few contexts of MLIR instead of one each."""

from __future__ import annotations

import threading
from typing import Any

from jax._src.interpreters import mlir

PROGRAMS = 64
"""How many share a context, which keeps the constants and the places in source of all of them."""


def share_contexts() -> None:
    """From now on, in this process: a context takes as long to make as a small program to lower.

    Nothing else changes: a program's text and its key in the compilation cache are the same.
    """
    # A name of JAX's own, which a later version may not have.
    make, own = getattr(mlir, "make_ir_context", None), threading.local()
    if make is None:
        return

    def shared() -> Any:
        if getattr(own, "left", 0) == 0:
            own.left, own.context = PROGRAMS, make()
        own.left -= 1
        return own.context

    mlir.make_ir_context = shared
