"""What a layout can do at most, without queues: closed forms beside the simulation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from pshare_jax.bench.agents_workload import Workload
from pshare_jax.bench.plan.costs import CostModel
from pshare_jax.core.buckets import bucket_for


@dataclass(frozen=True)
class Bound:
    """Sessions a second that the prefill side and the decode side can do, each for itself."""

    prefill: float
    decode: float

    @property
    def sessions_per_s(self) -> float:
        """The slower side's."""
        return min(self.prefill, self.decode)

    @property
    def limit(self) -> str:
        """The slower side."""
        return "prefill" if self.prefill < self.decode else "decode"


def prefill_seconds(
    costs: CostModel, workload: Workload, chunk_buckets: Sequence[int], page_size: int, shared: bool
) -> float:
    """Seconds of one session's chunks on one engine whose cache never forgets."""
    covered: dict[Hashable, int] = {}
    seconds = 0.0
    for call in workload.calls():
        key = None if shared else call.model
        start, cover = covered.get(key, 0), call.prompt - 1
        while start < cover:
            end = start + max(chunk_buckets)
            end = cover if end >= cover else end - end % page_size
            seconds += costs.chunk(bucket_for(end - start, chunk_buckets), end - start, start)
            start = end
        covered[key] = cover
    return seconds


def decode_seconds(
    costs: CostModel, workload: Workload, batch_buckets: Sequence[int], rows: int
) -> float:
    """Seconds of one session's share of decode steps in which `rows` sequences go together."""
    seconds = 0.0
    for call in workload.calls():
        context = call.prompt + (workload.generated - 1) / 2
        step = costs.decode_step(bucket_for(rows, batch_buckets), rows, rows * context)
        seconds += workload.generated * step / rows
    return seconds


def bound(
    costs: tuple[CostModel, CostModel],
    engines: tuple[int, float],
    workload: Workload,
    buckets: tuple[Sequence[int], Sequence[int]],
    page_size: int,
    *,
    shared: bool,
    groups: int,
    live: float,
) -> Bound:
    """Rates of engines that are split between prefill and decode.

    Args:
        costs: of a prefill engine and of a decode engine.
        engines: how many of each.
        workload: the sessions.
        buckets: chunk lengths and batch sizes.
        page_size: tokens of a page.
        shared: whether the models share one prefill.
        groups: groups of models that each decode engine steps one after the other.
        live: sessions that decode at once, spread evenly.
    """
    rows = min(max(round(live / (engines[1] * groups)), 1), max(buckets[1]))
    return Bound(
        engines[0] / prefill_seconds(costs[0], workload, buckets[0], page_size, shared),
        engines[1] / decode_seconds(costs[1], workload, buckets[1], rows),
    )
