"""What workers have done and are doing, as one `EngineStats`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pshare_jax.cluster.worker import DecodeWorker, PrefillWorker
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.stats import EngineStats, PoolStats, PrefillStats, UnaskedOutcome

Total = Callable[[Iterable[Mapping[Any, int]]], dict[Any, int]]
"""Adds counters up; see `ServedModels.total`."""


def worker_stats(
    prefill: Sequence[PrefillWorker[Any]],
    decode: Sequence[DecodeWorker[Any]],
    busy_seconds: Mapping[str, float],
    total: Total,
) -> EngineStats:
    """What these workers know; nothing of requests.

    Args:
        prefill: prefill workers.
        decode: decode workers.
        busy_seconds: time at work, by worker.
        total: adds counters up.
    """
    covers = [worker.core.stats for worker in prefill]
    generates = {worker.name: worker.core.stats for worker in decode}
    return EngineStats(
        prefill_tokens=total(stats.prefill_tokens for stats in covers),
        ahead_tokens=total(stats.ahead_tokens for stats in covers),
        foreseen_tokens=total(stats.foreseen_tokens for stats in covers),
        generation_tokens=total(stats.generation_tokens for stats in generates.values()),
        forced_tokens=total(stats.forced_tokens for stats in generates.values()),
        handoff_bytes=total(stats.handoff_bytes for stats in generates.values()),
        handoff_pages=total(stats.handoff_pages for stats in generates.values()),
        failed_transfers={
            **{worker.name: n for worker in prefill if (n := worker.core.stats.failed_loans)},
            **{name: stats.failed_transfers for name, stats in generates.items()},
        },
        preemptions=total(stats.preemptions for stats in generates.values()),
        decode_pages={
            (name, kind): count
            for name, stats in generates.items()
            for kind, count in dict(stats.pages).items()
        },
        running=total(worker.core.running() for worker in decode),
        pools={worker.name: _pool_stats(worker.cache) for worker in (*prefill, *decode)},
        busy_seconds=dict(busy_seconds),
        borrowed_tokens={
            worker.name: n for worker in prefill if (n := worker.core.stats.borrowed_tokens)
        },
        unasked=_unasked(covers, {name: stats.used_offers for name, stats in generates.items()}),
    )


def _unasked(
    covers: Iterable[PrefillStats], used: Mapping[str, int]
) -> dict[tuple[str, UnaskedOutcome], int]:
    """Offers that nobody had asked for, as prefill workers and decode workers count them."""
    found: Counter[tuple[str, UnaskedOutcome]] = Counter()
    for stats in covers:
        found.update(dict(stats.unasked))
    for name, count in used.items():
        if count:
            found[name, "used"] = count
    return dict(found)


def _pool_stats(cache: PageCache) -> PoolStats:
    counts = cache.counts()
    return PoolStats(counts.total, counts.free, counts.used, counts.shared, counts.cached)
