"""Metrics of the KV store."""

from __future__ import annotations

from pshare_jax.core.stats import EngineStats, TierStats
from pshare_jax.serve.metrics import Metrics
from pshare_jax.serve.role_metrics import role_metrics
from pshare_jax.serve.store_metrics import store_metrics

TIER = TierStats(
    slots={"free": 3, "ready": 5},
    hits=7,
    stored=9,
    missed={"missing": 2, "checksum": 1},
    refused={"exists": 4},
    bytes_read=700,
    bytes_written=900,
    raw_bytes_written=1290,
    read_seconds=0.5,
    write_seconds=0.25,
    buried=1,
    rebuilt=2,
)
ASKED = {
    "looks": 3,
    "fetched_tokens": 64,
    "declined": 1,
    "late": 0,
    "stall_seconds": 0.125,
    "early_bytes": 4096,
    "early_used_bytes": 2048,
    "early_wasted_bytes": 1024,
}


def test_every_figure_of_the_store_is_shown() -> None:
    stats = EngineStats(tiers={"shared": TIER}, store={"prefill0": ASKED})
    text = Metrics(["model"], lambda: stats).render().decode()
    for line in (
        'pshare_store_hits_total{tier="shared"} 7.0',
        'pshare_store_stored_total{tier="shared"} 9.0',
        'pshare_store_read_bytes_total{tier="shared"} 700.0',
        'pshare_store_written_bytes_total{tier="shared"} 900.0',
        'pshare_store_written_raw_bytes_total{tier="shared"} 1290.0',
        'pshare_store_read_seconds_total{tier="shared"} 0.5',
        'pshare_store_write_seconds_total{tier="shared"} 0.25',
        'pshare_store_buried_total{tier="shared"} 1.0',
        'pshare_store_rebuilt_total{tier="shared"} 2.0',
        'pshare_store_missed_total{reason="checksum",tier="shared"} 1.0',
        'pshare_store_refused_total{reason="exists",tier="shared"} 4.0',
        'pshare_store_slots{state="ready",tier="shared"} 5.0',
        'pshare_store_looks_total{engine="prefill0"} 3.0',
        'pshare_store_fetched_tokens_total{engine="prefill0"} 64.0',
        'pshare_store_declined_total{engine="prefill0"} 1.0',
        'pshare_store_late_total{engine="prefill0"} 0.0',
        'pshare_store_stall_seconds_total{engine="prefill0"} 0.125',
        'pshare_store_early_bytes_total{engine="prefill0"} 4096.0',
        'pshare_store_early_used_bytes_total{engine="prefill0"} 2048.0',
        'pshare_store_early_wasted_bytes_total{engine="prefill0"} 1024.0',
    ):
        assert line in text, line


def test_roles_are_shown() -> None:
    stats = EngineStats(moved_rows={"decode1": 3}, working={"prefill1": True, "decode1": False})
    text = Metrics(["model"], lambda: stats).render().decode()
    for line in (
        'pshare_engine_working{engine="prefill1"} 1.0',
        'pshare_engine_working{engine="decode1"} 0.0',
        'pshare_moved_sequences_total{engine="decode1"} 3.0',
    ):
        assert line in text, line


def test_without_a_store_there_are_no_series() -> None:
    assert all(family.samples == [] for family in role_metrics(EngineStats()))
    assert all(family.samples == [] for family in store_metrics(EngineStats()))
