"""Who has pages of a prompt that its prefill worker lacks, as a router knows it."""

from __future__ import annotations

from pshare_jax.core.fleet import Fleet
from pshare_jax.core.sequences import Sequence
from pshare_jax.core.worker_view import WorkerView


def lender_of(
    sequence: Sequence,
    lacking: int,
    prefill: WorkerView,
    decode: WorkerView,
    covering: Fleet,
    generating: Fleet,
) -> str:
    """The worker that has most full pages of a prompt, or nothing where nobody has more.

    Of those who have as much the one that generates, whose pages will not be fetched then. Who
    shares its pool with another worker neither gets nor gives pages.

    Args:
        sequence: of the prompt.
        lacking: tokens that are neither with its prefill worker nor in the KV store.
        prefill: who covers it.
        decode: who generates.
        covering: all prefill workers.
        generating: all decode workers.
    """
    page_size = prefill.info.page_size
    if prefill.info.partner or lacking < page_size:
        return ""
    best, most = "", (sequence.covered - lacking) // page_size
    for fleet, first in ((generating, decode), (covering, prefill)):
        run, view = fleet.holder(sequence.keys, first)
        if view is None or view is prefill or view.info.partner:
            continue
        if run > most:
            best, most = view.info.name, run
    return best
