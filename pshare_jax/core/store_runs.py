"""What a prefill core waits for from the KV store: answers, and runs of pages in pieces."""

from __future__ import annotations

from dataclasses import dataclass, field

from pshare_jax.core.pages.prefix_index import Node
from pshare_jax.core.plans import Load
from pshare_jax.core.prefill_task import PrefillTask
from pshare_jax.core.sequences import Sequence


@dataclass(eq=False)
class Looking:
    """A prompt that is looked for; `seconds` is how long its answer is worth waiting for."""

    task: PrefillTask
    first: int
    seconds: float
    since: float | None = None


@dataclass(eq=False)
class Piece:
    """Pages that are fetched together: nodes by page number within the sequence."""

    transfer: int
    nodes: list[Node]
    load: Load
    loaded: bool = False


@dataclass(eq=False)
class Run:
    """Pages that are fetched for one prompt; all of them, and those before them, are referenced.

    Nobody has asked for those of one that is `early`."""

    sequence: Sequence
    pages: list[int]
    seconds: float
    early: bool = False
    pieces: dict[int, Piece] = field(default_factory=dict)
    since: float | None = None
