"""What `/metrics` shows of the KV store: by tier, and what prefill workers have asked of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from pshare_jax.core.stats import EngineStats, TierStats

_TIER: tuple[tuple[str, str, Callable[[TierStats], float]], ...] = (
    ("hits", "Pages read from a tier of the KV store.", lambda tier: tier.hits),
    ("stored", "Pages written to a tier.", lambda tier: tier.stored),
    ("read_bytes", "Bytes of records read.", lambda tier: tier.bytes_read),
    ("written_bytes", "Bytes of records written.", lambda tier: tier.bytes_written),
    (
        "written_raw_bytes",
        "Bytes of the written pages as they are in a pool; by those written: the codec's ratio.",
        lambda tier: tier.raw_bytes_written,
    ),
    ("read_seconds", "Time spent in reading and decoding.", lambda tier: tier.read_seconds),
    ("write_seconds", "Time spent in coding and writing.", lambda tier: tier.write_seconds),
    ("buried", "Processes that died with pins or half-written pages.", lambda tier: tier.buried),
    ("rebuilt", "Times that the books were built anew.", lambda tier: tier.rebuilt),
)
_BY_REASON: tuple[tuple[str, str, Callable[[TierStats], dict[str, int]]], ...] = (
    ("missed", "Pages that were not there or not what was asked for.", lambda t: dict(t.missed)),
    ("refused", "Pages that were not written.", lambda t: dict(t.refused)),
)
_WORKER = (
    ("looks", "Prompts that were looked for in the KV store."),
    ("fetched_tokens", "Prompt tokens whose KV was fetched instead of computed."),
    ("declined", "Pages in the store that were computed since that was cheaper or room lacked."),
    ("late", "Answers of the store that were not waited for any longer."),
    ("stall_seconds", "Seconds that prompts have waited for the store."),
    ("early_bytes", "Bytes of pages that were fetched before a prompt asked for them."),
    ("early_used_bytes", "Of these, bytes of pages that a prompt then used."),
    ("early_wasted_bytes", "Of these, bytes of pages that were evicted before."),
)


def store_metrics(stats: EngineStats) -> Iterator[Metric]:
    """The families of the KV store, without series where there is none."""
    for name, text, value in _TIER:
        family = CounterMetricFamily(f"pshare_store_{name}", text, labels=["tier"])
        for tier, found in stats.tiers.items():
            family.add_metric([tier], value(found))
        yield family
    for name, text, reasons in _BY_REASON:
        family = CounterMetricFamily(f"pshare_store_{name}", text, labels=["tier", "reason"])
        for tier, found in stats.tiers.items():
            for reason, count in reasons(found).items():
                family.add_metric([tier, reason], count)
        yield family
    slots = GaugeMetricFamily(
        "pshare_store_slots", "Slots of a tier, of all its processes.", labels=["tier", "state"]
    )
    for tier, found in stats.tiers.items():
        for state, count in found.slots.items():
            slots.add_metric([tier, state], count)
    yield slots
    for name, text in _WORKER:
        family = CounterMetricFamily(f"pshare_store_{name}", text, labels=["engine"])
        for worker, counts in stats.store.items():
            family.add_metric([worker], counts[name])
        yield family
