"""Flags by which tests compile in a fraction of the time, and who does without. Imports no jax."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib.metadata import version

QUICK = (
    "--xla_llvm_disable_expensive_passes=true",
    # Without the newer emitter of fused loops, which later versions have alone; and programs whole:
    # their parts would be compiled side by side, for which there are no cores to spare.
    *(
        ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
        if version("jaxlib").startswith("0.10.")
        else ()
    ),
)
USERS = any(os.environ.get(name, "") not in ("", "0") for name in ("EXHAUSTIVE", "SOAK_MINUTES"))
"""Whether this run takes the compiler that users have: one that takes its time anyway."""


def set_quick() -> None:
    """Sets the flags, for this process and those that it starts; before jax is imported."""
    os.environ["XLA_FLAGS"] = " ".join((*_others(), *QUICK))


@contextlib.contextmanager
def as_users_have_it() -> Iterator[None]:
    """Processes that are started meanwhile have none of the flags.

    Nothing is to be compiled here meanwhile: a process reads its flags when it first computes.
    """
    before = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = " ".join(_others())
    try:
        yield
    finally:
        del os.environ["XLA_FLAGS"]
        if before is not None:
            os.environ["XLA_FLAGS"] = before


def _others() -> list[str]:
    """What `XLA_FLAGS` has besides, of whoever runs the tests."""
    return [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in QUICK]
