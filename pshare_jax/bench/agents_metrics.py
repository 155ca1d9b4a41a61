"""What the servers' own `/metrics` say about a run, where they have them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

_SECONDS_BETWEEN = 0.5
_COUNTERS = {
    "pshare_busy_seconds_total": ("busy_seconds", "engine"),
    "pshare_prefill_tokens_total": ("prefill_tokens", "source"),
    "pshare_reply_prefill_tokens_total": ("reply_prefill_tokens", None),
    "pshare_reply_prefill_used_tokens_total": ("reply_prefill_used_tokens", None),
    "pshare_handoff_bytes_total": ("handoff_bytes", None),
    "pshare_handoff_pages_total": ("handoff_pages", None),
    "pshare_compiles_total": ("compiles", None),
    "vllm:num_preemptions_total": ("preemptions", None),
}
_PAGES = "pshare_pages"


class ServerMetrics:
    """Counters over a `watched` block, summed over servers, and the peaks of their page pools.

    Attributes:
        counters: `(figure, label value)` to its growth; empty where a server shows none.
        peak_pages: pool name to most pages that held KV, in use or cached.
    """

    def __init__(self) -> None:
        self.counters: dict[tuple[str, str], float] = defaultdict(float)
        self.peak_pages: dict[str, float] = {}

    def grown(self, figure: str, prefix: str = "") -> float | None:
        """Growth of a figure over all labels that start with `prefix`; None if not shown."""
        values = [
            value
            for (name, label), value in self.counters.items()
            if name == figure and label.startswith(prefix)
        ]
        return sum(values) if values else None

    def as_dict(self) -> dict[str, Any]:
        """For the result file. Bytes of KV follow from the bytes a page of the handoff."""
        result: dict[str, Any] = {}
        for (name, label), value in sorted(self.counters.items()):
            if label:
                result.setdefault(name, {})[label] = value
            else:
                result[name] = value
        pages = self.grown("handoff_pages")
        if pages:
            page_bytes = (self.grown("handoff_bytes") or 0) / pages
            result["peak_kv_bytes"] = {p: n * page_bytes for p, n in self.peak_pages.items()}
        return result


@asynccontextmanager
async def watched(http: aiohttp.ClientSession, urls: Iterable[str]) -> AsyncIterator[ServerMetrics]:
    """Watches the servers at `urls` (each once) while the block runs."""
    servers = sorted(set(urls))
    metrics = ServerMetrics()
    before = [await _read(http, url) for url in servers]

    async def poll() -> None:
        while True:
            for url in servers:
                _note_pages(metrics, await _read(http, url))
            await asyncio.sleep(_SECONDS_BETWEEN)

    task = asyncio.create_task(poll()) if any(before) else None
    try:
        yield metrics
    finally:
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    for url, earlier in zip(servers, before, strict=True):
        later = await _read(http, url)
        _note_pages(metrics, later)
        for key, value in _counters(later).items():
            metrics.counters[key] += value - _counters(earlier).get(key, 0)


Samples = list[tuple[str, dict[str, str], float]]


async def _read(http: aiohttp.ClientSession, url: str) -> Samples:
    """Samples of `/metrics`; none where the server has no such page."""
    try:
        async with http.get(f"{url}/metrics") as response:
            if response.status != 200:
                return []
            text = await response.text()
    except (aiohttp.ClientError, TimeoutError):
        return []
    try:
        return [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name in _COUNTERS or sample.name == _PAGES
        ]
    except ValueError:
        return []


def _counters(samples: Samples) -> dict[tuple[str, str], float]:
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for name, labels, value in samples:
        if name in _COUNTERS:
            figure, label = _COUNTERS[name]
            sums[figure, labels.get(label, "") if label else ""] += value
    return sums


def _note_pages(metrics: ServerMetrics, samples: Samples) -> None:
    held: dict[str, float] = defaultdict(float)
    for name, labels, value in samples:
        if name == _PAGES and labels["state"] in ("used", "cached"):
            held[labels["pool"]] += value
    for pool, pages in held.items():
        metrics.peak_pages[pool] = max(pages, metrics.peak_pages.get(pool, 0))
