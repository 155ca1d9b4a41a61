"""Metrics of pages that come from other processes."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric

from pshare_jax.core.stats import EngineStats


def transfer_metrics(stats: EngineStats) -> Iterator[Metric]:
    """By the worker that they have come to, or were to come to."""
    transfers = CounterMetricFamily(
        "pshare_transfers",
        "Transfers of pages that have come from other processes, by their way.",
        labels=["engine", "transport"],
    )
    for labels, count in stats.transfers.items():
        transfers.add_metric(labels, count)
    yield transfers
    num_bytes = CounterMetricFamily(
        "pshare_transfer_bytes",
        "Bytes of pages from other processes, as they are in a pool (raw) and as they came (wire).",
        labels=["engine", "transport", "codec", "kind"],
    )
    for labels, count in stats.transfer_bytes.items():
        num_bytes.add_metric(labels, count)
    yield num_bytes
    miscoded = CounterMetricFamily(
        "pshare_transfers_miscoded",
        "Transfers that came coded and were not what they should be; nothing of them was used.",
        labels=["engine", "reason"],
    )
    for labels, count in stats.miscoded.items():
        miscoded.add_metric(labels, count)
    yield miscoded
    unasked = CounterMetricFamily(
        "pshare_unasked_offers",
        "Offers of pages that a decode worker had not asked for: made, used, not made (crowded).",
        labels=["engine", "outcome"],
    )
    for labels, count in stats.unasked.items():
        unasked.add_metric(labels, count)
    yield unasked
