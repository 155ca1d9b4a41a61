"""Tiers below the pools in virtual time: what fetching on demand and ahead does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pshare_jax.bench import routes, shift, tiers
from pshare_jax.bench.plan.costs import Line, TableCosts

COSTS = TableCosts(
    {128: Line(0.03, 1e-5), 512: Line(0.1, 4e-5)},
    {1: Line(0.004, 1e-6), 32: Line(0.02, 1e-6)},
)
SLOW = tiers.TiersOptions(sessions=6, agents=3, rounds=3, pause=2.0, surprise=0.0)


def simulate(policy: str, page: float, **settings: float) -> dict:
    options = replace(SLOW, **settings)  # type: ignore[arg-type]
    store = tiers._store(options, COSTS, policy, page, 0.5)
    return tiers._simulate(options, COSTS, policy, store)


def test_a_tier_saves_computing_and_fetching_ahead_saves_waiting() -> None:
    found = {policy: simulate(policy, 0.01) for policy in tiers.POLICIES}
    assert {row["calls"] for row in found.values()} == {36}
    none, demand, told = (found[p] for p in ("LRU only", "on demand", "next agent, told"))
    assert none["hits"] < 0.3 < 0.8 < demand["hits"]
    assert (none["read_bytes"], none["stall"]) == (0, 0)
    assert told["stall"] < 0.8 * demand["stall"]
    assert told["ttft_median"] < demand["ttft_median"]
    assert told["early_bytes"] > 0
    assert found["next layer"]["stall"] < demand["stall"]
    assert demand["early_bytes"] == demand["wasted_bytes"] == 0


def test_what_is_fetched_in_vain_is_counted() -> None:
    """When every other call is of somebody else than learned."""
    learned = simulate("next agent, learned", 0.001, surprise=0.5)
    told = simulate("next agent, told", 0.001, surprise=0.5)
    assert learned["wasted_bytes"] > told["wasted_bytes"] >= 0
    assert learned["wasted_bytes"] < learned["early_bytes"]


def test_tables_have_a_row_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "read_results", lambda files: [])
    monkeypatch.setattr(tiers, "table_costs", lambda results: COSTS)
    result = tiers.run(replace(SLOW, sessions=2, rounds=2, sets=[1.0], tiers={"a disk": 0.01}))
    assert [row["policy"] for row in result["rows"]] == list(tiers.POLICIES)
    assert sum("| on demand |" in line for line in tiers.lines(result)) == 1


def test_with_a_store_load_alone_spreads_what_is_popular() -> None:
    options = routes.RoutesOptions(texts=3, prompts=60, prefix=512, own=128, pool_texts=4)
    found = {
        way: routes._simulate(options, COSTS, 2, 2.0, policy, stores)
        for way, policy, stores in routes.WAYS
    }
    by_prefix, by_load = found["prefix, store"], found["load, store"]
    assert by_load["ttft_p95"] < by_prefix["ttft_p95"]
    assert by_load["read_bytes"] > by_prefix["read_bytes"]
    assert by_load["computed"] < found["prefix, no store"]["computed"] + 64


def test_rows_that_move_pause_for_less_time_than_rows_that_are_replayed() -> None:
    options = shift.ShiftOptions(
        rows=24, reply=256, context=512, shift=1.5, prompts=12, long=4096, backlog=8192
    )
    result = shift.run(options)
    found = {row["way"]: row for row in result["rows"]}
    static, drained, replayed, moved, alone = (found[name] for name, _ in shift.WAYS)
    assert moved["moved_rows"] == 16
    assert moved["moved_bytes"] > 0 == replayed["moved_bytes"]
    assert moved["gap_worst"] < 0.5 * replayed["gap_median"]
    assert moved["ttft_median"] < 0.6 * static["ttft_median"]
    assert drained["flip_seconds"] > moved["flip_seconds"]
    assert alone["moved_rows"] > 0
    assert len(shift.lines(result)) == 4 + len(shift.WAYS)
