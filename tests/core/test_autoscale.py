"""The policy that says how many workers there should be: right, patient, and never flapping."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from pshare_jax.core.autoscale import (
    Autoscaler,
    Capacity,
    Demand,
    Observation,
    Policy,
    Split,
    best_split,
    demand_of,
)

CAPACITY = Capacity(prefill_tokens_per_s=1000.0, decode_sequences=10.0, decode_pages=100.0)
EVERY = 5.0
"""Seconds between observations."""


def watch(
    scaler: Autoscaler,
    seconds: float,
    *,
    prefill: float = 0.0,
    decode: float = 0.0,
    start: float = 0.0,
    noise: np.random.Generator | None = None,
) -> list[tuple[float, Split]]:
    """Changes during some time of a steady demand, in workers; with noise it comes at random."""
    changes = []
    for now in np.arange(start, start + seconds, EVERY):
        # Calls of 2,000 tokens, and as many sequences as there are.
        calls, sequences = prefill * EVERY / 2, decode * 10
        if noise is not None:
            calls, sequences = noise.poisson(calls), noise.poisson(sequences)
        seen = Observation(now, calls * 2000 / EVERY, 0.0, sequences, 0.0)
        if (split := scaler.observe(seen)) is not None:
            changes.append((float(now), split))
    return changes


def test_demand_is_what_workers_would_be_fully_busy_with() -> None:
    seen = Observation(0.0, 500.0, 3000.0, 25, 120)
    assert demand_of(seen, CAPACITY, drain_seconds=2.0) == Demand(2.0, 2.5)
    assert demand_of(seen, CAPACITY, drain_seconds=6.0) == Demand(1.0, 2.5)
    # Pages of long contexts are short before slots are.
    assert demand_of(Observation(0.0, 0, 0, 4, 120), CAPACITY, 1.0) == Demand(0.0, 1.2)
    assert Demand(1.5, 2.0).load(Split(2, 2)) == 1.0


@given(st.floats(0, 50), st.floats(0, 50), st.integers(2, 40))
def test_the_best_split_is_the_one_whose_busier_side_is_least_busy(prefill, decode, devices):
    demand = Demand(prefill, decode)
    best = best_split(demand, devices)
    assert best.prefill + best.decode == devices
    loads = [demand.load(Split(p, devices - p)) for p in range(1, devices)]
    assert demand.load(best) == min(loads)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("prefill", "decode"), [(1.2, 3.1), (2.6, 2.6), (0.3, 0.4), (3.5, 1.0)])
def test_a_steady_load_at_random_is_no_reason_to_change_again(prefill, decode, seed) -> None:
    """Two hours in which nothing happens but chance: at most one more step, and never back."""
    noise = np.random.default_rng(seed)
    scaler = Autoscaler(CAPACITY, Policy(devices=8), Split(4, 4))
    changes = watch(scaler, 1800, prefill=prefill, decode=decode, noise=noise)
    later = watch(scaler, 7200, prefill=prefill, decode=decode, start=1800, noise=noise)
    assert len(later) <= 1
    steps = np.diff([4, *(split.prefill for _, split in (*changes, *later))])
    assert all(steps == 1) or all(steps == -1)
    best = best_split(Demand(prefill, decode), 8)
    if max(prefill, decode) / 4 > Policy().calm:
        assert abs(scaler.split.prefill - best.prefill) <= 1
    else:
        assert scaler.split == Split(4, 4), "nearly idle, it makes no difference"


def test_when_the_load_changes_sides_so_do_workers() -> None:
    noise = np.random.default_rng(0)
    scaler = Autoscaler(CAPACITY, Policy(devices=8), Split(2, 6))
    assert watch(scaler, 600, prefill=1.0, decode=4.0, noise=noise) == []
    changes = watch(scaler, 1200, prefill=4.5, decode=1.0, start=600, noise=noise)
    assert [split.prefill for _, split in changes] == [3, 4, 5, 6]
    # One at a time, each after the one before has settled; where there is too much to do, soon.
    moments = [moment - 600 for moment, _ in changes]
    assert min(np.diff(moments)) >= Policy().settle_seconds
    assert moments[0] < 90
    assert moments[2] < 300
    back = watch(scaler, 1200, prefill=1.0, decode=4.0, start=1800, noise=noise)
    assert [split.prefill for _, split in back][:3] == [5, 4, 3]


def test_a_burst_that_passes_changes_nothing() -> None:
    scaler = Autoscaler(CAPACITY, Policy(devices=8), Split(2, 6))
    watch(scaler, 300, prefill=1.0, decode=4.0)
    assert watch(scaler, 10, prefill=8.0, decode=4.0, start=300) == []
    assert watch(scaler, 600, prefill=1.0, decode=4.0, start=310) == []


def test_without_a_number_of_devices_each_side_grows_soon_and_shrinks_late() -> None:
    policy = Policy(most=Split(9, 9))
    scaler = Autoscaler(CAPACITY, policy, Split(1, 1))
    grown = watch(scaler, 600, prefill=2.9, decode=1.4)
    # At three quarters of what workers can do; at first no more than twice as many.
    assert grown[0] == (policy.window + policy.rise_seconds, Split(2, 2))
    assert grown[-1][1] == Split(4, 2)
    assert watch(scaler, 600, prefill=2.9, decode=1.4, start=600) == []
    shrunk = watch(scaler, 3600, prefill=0.2, decode=1.4, start=1200)
    assert [split.prefill for _, split in shrunk] == [3, 2, 1]
    assert {split.decode for _, split in shrunk} == {2}
    assert shrunk[0][0] - 1200 >= policy.fall_seconds
    watch(scaler, 1200, prefill=100.0, decode=0.0, start=4800)
    assert scaler.split.prefill == policy.most.prefill


def test_new_figures_of_what_a_worker_can_do_count_at_once() -> None:
    scaler = Autoscaler(CAPACITY, Policy(devices=4), Split(2, 2))
    assert watch(scaler, 300, prefill=1.0, decode=1.0) == []
    scaler.capacity = Capacity(300.0, 10.0, 100.0)
    assert watch(scaler, 300, prefill=1.0, decode=1.0, start=300)[0][1] == Split(3, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0, 12),
    st.floats(0, 12),
    st.integers(2, 12),
    st.data(),
    st.booleans(),
)
def test_a_constant_demand_is_followed_to_an_end_and_never_back(
    prefill, decode, devices, data, fixed
) -> None:
    start = data.draw(st.integers(1, devices - 1))
    policy = Policy(devices=devices if fixed else 0, most=Split(devices, devices))
    scaler = Autoscaler(CAPACITY, policy, Split(start, devices - start))
    changes = watch(scaler, 9000, prefill=prefill, decode=decode)
    for side in ("prefill", "decode"):
        counts = [getattr(split, side) for _, split in changes]
        steps = np.diff([start if side == "prefill" else devices - start, *counts])
        assert all(steps >= 0) or all(steps <= 0)
        assert all(1 <= count <= max(devices, start) for count in counts)
    moments = [moment for moment, _ in changes]
    assert all(np.diff(moments) >= policy.settle_seconds)
    assert watch(scaler, 1200, prefill=prefill, decode=decode, start=9000) == []
    if fixed:
        assert scaler.split.prefill + scaler.split.decode == devices
