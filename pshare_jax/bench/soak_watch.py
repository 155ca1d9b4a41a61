"""What `bench soak` looks at: a server's process and metrics, and what of them may not grow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

# The C library gives memory back in pieces, and the kernel counts pages that were touched once.
MEMORY_SHARE, MEMORY_MIB = 0.02, 32.0
# What one idle scrape may find open or not.
FILES = 3
LAG_SECONDS = 0.05
_LAG = "pshare_event_loop_lag_seconds"
_OWN_LAG = "pshare_event_loop_own_lag_seconds"


@dataclass(frozen=True)
class Sample:
    """The server at one time.

    Args:
        seconds: since the traffic began.
        rss_mib: resident memory.
        files: open file descriptors.
        threads: of the process.
        pages_used: pages of all pools that sequences hold.
        running: sequences that run or wait.
        compiles: since the server was ready.
        lags: how often the event loop was at most so late, by the bound in seconds.
        own_lags: the same, of the lag that its own work made (processor time of its thread).
    """

    seconds: float
    rss_mib: float
    files: int
    threads: int
    pages_used: float
    running: float
    compiles: float
    lags: dict[float, float]
    own_lags: dict[float, float]


class Watch:
    """Looks at the server with process id `pid`."""

    def __init__(self, session: aiohttp.ClientSession, pid: int):
        self._session = session
        self._process = Path(f"/proc/{pid}")

    async def models(self) -> list[str]:
        """Names of the served models."""
        async with self._session.get("/v1/models") as response:
            response.raise_for_status()
            return [model["id"] for model in (await response.json())["data"]]

    async def sample(self, seconds: float) -> Sample:
        """The server now.

        Raises:
            OSError: the process has ended, or this system has no /proc.
        """
        async with self._session.get("/metrics") as response:
            response.raise_for_status()
            text = await response.text()
        status = dict(
            line.split(":", 1) for line in (self._process / "status").read_text().splitlines()
        )
        return Sample(
            seconds=round(seconds, 1),
            rss_mib=int(status["VmRSS"].split()[0]) / 1024,
            files=len(os.listdir(self._process / "fd")),
            threads=int(status["Threads"]),
            **_metrics(text),
        )


def _metrics(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {"pages_used": 0.0, "running": 0.0, "compiles": 0.0}
    found["lags"], found["own_lags"] = {}, {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            match sample.name:
                case "pshare_pages" if sample.labels["state"] == "used":
                    found["pages_used"] += sample.value
                case "vllm:num_requests_running" | "vllm:num_requests_waiting":
                    found["running"] += sample.value
                case "pshare_compiles_total":
                    found["compiles"] = sample.value
                case name if name in (f"{_LAG}_bucket", f"{_OWN_LAG}_bucket"):
                    lags = found["lags" if name == f"{_LAG}_bucket" else "own_lags"]
                    lags[float(sample.labels["le"])] = sample.value
    return found


@dataclass(frozen=True)
class Verdict:
    """One thing that was looked at: what was found, what it may be, and whether it is."""

    found: str
    bound: str
    kept: bool


def judge(
    before: Sample, samples: Sequence[Sample], after: Sample, compared: int, faults: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The verdicts.

    Args:
        before: the idle server, its caches filled.
        samples: under load, in order, those of the warm part left out.
        after: the idle server again.
        compared: answers that were compared with those of the request alone.
        faults: what went wrong.
    """
    verdicts = {"answers": _answers(compared, faults), "memory": _memory(samples)}
    files = abs(after.files - before.files) <= FILES
    verdicts["open files"] = Verdict(
        f"{before.files} idle, at most {max(s.files for s in samples)}, {after.files} idle",
        f"as before, +- {FILES}",
        files,
    )
    most = max(s.threads for s in samples)
    verdicts["threads"] = Verdict(
        f"{before.threads} idle, at most {most}, {after.threads} idle",
        "none more at the end than under load before",
        after.threads <= max(before.threads, median(s.threads for s in samples)),
    )
    verdicts["pages held"] = Verdict(
        f"{before.pages_used:g} idle, at most {max(s.pages_used for s in samples):g}, "
        f"{after.pages_used:g} idle",
        "0 idle",
        after.pages_used == 0,
    )
    verdicts["compilations"] = Verdict(f"{after.compiles:g}", "0", after.compiles == 0)
    first, last = samples[0], samples[-1]
    for name, key, bounded in (
        ("event loop lag", "lags", False),
        ("event loop lag, its own work", "own_lags", True),
    ):
        verdicts[name] = _lag(getattr(first, key), getattr(last, key), bounded)
    return {
        name: {"found": verdict.found, "bound": verdict.bound, "kept": verdict.kept}
        for name, verdict in verdicts.items()
    }


def _answers(compared: int, faults: Sequence[str]) -> Verdict:
    return Verdict(
        f"{compared} compared, {len(faults)} faults",
        "all as alone, no fault",
        compared > 0 and not faults,
    )


def _memory(samples: Sequence[Sample]) -> Verdict:
    """Medians of the first and the last third: single samples hold what requests hold."""
    third = max(1, len(samples) // 3)
    first = median(s.rss_mib for s in samples[:third])
    last = median(s.rss_mib for s in samples[-third:])
    most = max(MEMORY_MIB, MEMORY_SHARE * first)
    return Verdict(
        f"{first:.0f} MiB, later {last:.0f} MiB", f"+ {most:.0f} MiB at most", last - first <= most
    )


def quantile(before: dict[float, float], after: dict[float, float], share: float) -> float:
    """The least bound (seconds) within which `share` of the observations between two samples lie.

    0 where nothing was observed.
    """
    counts = {bound: after[bound] - before.get(bound, 0) for bound in sorted(after)}
    total = max(counts.values(), default=0)
    return next((b for b, count in counts.items() if total and count >= share * total), 0.0)


def _lag(before: dict[float, float], after: dict[float, float], bounded: bool) -> Verdict:
    p99 = quantile(before, after, 0.99)
    found = f"p50 {quantile(before, after, 0.5) * 1e3:g} ms, p99 {p99 * 1e3:g} ms at most"
    if not bounded:
        return Verdict(found, "the machine's other work is in it", True)
    return Verdict(found, f"p99 below {LAG_SECONDS * 1e3:g} ms", p99 <= LAG_SECONDS)
