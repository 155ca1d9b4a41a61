"""The end of the KV store that a prefill worker has: what carries out its core's store plans."""

from __future__ import annotations

from typing import Protocol

from pshare_jax.core.plans import StorePlan


class StoreEnd(Protocol):
    """A worker's end of the KV store; all belongs to the thread that owns the worker's pool."""

    def run(self, plan: StorePlan) -> None:
        """Writes what has been fetched into the pool, copies what is to be stored, and hands the
        rest to others.

        What is looked for is answered by `Looked`, loads by `Loaded` (each of them, once), saves
        and keys that turn out to be gone by `Stored`.
        """
        ...
