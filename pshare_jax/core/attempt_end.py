"""What the workers of an attempt are told when it ends before its time."""

from __future__ import annotations

from collections.abc import Container

from pshare_jax.core import messages as m
from pshare_jax.core.live_request import LiveRequest
from pshare_jax.core.messages import Outbox


def needs(live: LiveRequest, worker: str) -> bool:
    """Whether a request's present attempt waits for something of a worker."""
    sequence = live.sequence
    return sequence is not None and (
        sequence.decode_worker == worker or (sequence.prefill_worker == worker and not live.started)
    )


def aborted(live: LiveRequest, lost: Container[str]) -> Outbox:
    """Whoever has the present attempt is told that nobody waits for it; `lost` are not alive."""
    sequence = live.sequence
    if sequence is None:
        return []
    to = sequence.prefill_worker
    if live.started or sequence.moved or to in lost:
        to = sequence.decode_worker
    return [(to, m.Abort(sequence.id, sequence.decode_worker))]


def bereaved(live: LiveRequest, worker: str, lost: Container[str]) -> Outbox:
    """What others have of the present attempt they give up, since a worker that it needs failed.

    Args:
        live: the request.
        worker: that has failed.
        lost: all that are not alive, `worker` too.
    """
    sequence = live.sequence
    if sequence is None:
        return []
    if sequence.decode_worker == worker:
        if sequence.prefill_worker in lost:
            return []
        # In this order: between the two the prompt may become complete.
        to = sequence.prefill_worker
        return [(to, m.Abort(sequence.id)), (to, m.Release(sequence.held_id))]
    told: Outbox = [(sequence.decode_worker, m.Abort(sequence.id))]
    if sequence.lender and sequence.lender not in lost:
        told.append((sequence.lender, m.Repaid(sequence.id)))
    return told
