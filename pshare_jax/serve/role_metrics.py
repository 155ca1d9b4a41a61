"""What `/metrics` shows of meshes that change between prefill and decode."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from pshare_jax.core.stats import EngineStats


def role_metrics(stats: EngineStats) -> Iterator[Metric]:
    """The families of roles, without series where roles are fixed."""
    working = GaugeMetricFamily(
        "pshare_engine_working", "1 where the mesh works for this engine.", labels=["engine"]
    )
    for name, works in stats.working.items():
        working.add_metric([name], float(works))
    yield working
    moved = CounterMetricFamily(
        "pshare_moved_sequences",
        "Sequences that left a decode engine with their KV, since its mesh was given to prefill.",
        labels=["engine"],
    )
    for name, count in stats.moved_rows.items():
        moved.add_metric([name], count)
    yield moved
