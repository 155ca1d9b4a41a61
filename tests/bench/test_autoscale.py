"""Workers that change sides in virtual time, with the speeds of `bench plan`."""

from __future__ import annotations

import json

import pytest

from pshare_jax.bench.autoscale import (
    AutoscaleOptions,
    Phase,
    capacity_of,
    lines,
    machine_of,
    play,
    run,
)
from pshare_jax.bench.plan.costs import weight_bytes
from pshare_jax.core.autoscale import Demand, best_split
from pshare_jax.errors import ConfigError

GENERATES = Phase(seconds=300.0, calls_per_s=24.0, computed=512, context=4096, generated=256)
READS = Phase(seconds=700.0, calls_per_s=24.0, computed=4096, context=8192, generated=64)
OPTIONS = AutoscaleOptions(phases=[GENERATES, READS])


def test_capacity_is_that_of_the_roofline() -> None:
    machine = machine_of(OPTIONS)
    capacity = capacity_of(machine, READS, step_seconds=0.02)
    costs = machine.costs(1)
    seconds = costs.chunk(2048, 2048, READS.context - 2048)
    assert capacity.prefill_tokens_per_s == pytest.approx(2048 / seconds)
    rows = int(capacity.decode_sequences)
    assert costs.decode_step(64, rows, rows * READS.context) <= 0.02
    assert costs.decode_step(64, rows + 1, (rows + 1) * READS.context) > 0.02
    assert capacity.decode_pages == machine.pool_pages(1, weight_bytes(machine.model))


def test_after_a_change_of_load_the_split_is_good_and_stays() -> None:
    found = play(OPTIONS, OPTIONS.prefill, scales=True)
    counts = [count for _, count in found["changes"]]
    assert counts == sorted(counts)
    first, second = found["phases"]
    assert first["prefill"] == OPTIONS.prefill
    # By then all is as it should be: calls end as they come, and prompts do not wait.
    assert second["calls_per_s"] == pytest.approx(READS.calls_per_s, rel=0.05)
    assert second["covered_p95_s"] < 1.0
    assert second["step_p95_s"] < 2 * OPTIONS.step_seconds
    capacity = capacity_of(machine_of(OPTIONS), READS, OPTIONS.step_seconds)
    prefill = READS.calls_per_s * READS.computed / capacity.prefill_tokens_per_s
    steps = READS.generated * second["step_p95_s"] * READS.calls_per_s
    best = best_split(Demand(prefill, steps / capacity.decode_sequences), OPTIONS.devices)
    assert abs(second["prefill"] - best.prefill) <= 1


def test_left_alone_it_would_not_do() -> None:
    second = play(OPTIONS, OPTIONS.prefill, scales=False)["phases"][1]
    assert second["calls_per_s"] < 0.7 * READS.calls_per_s
    assert second["covered_p95_s"] > 30


def test_figures_are_plain_and_told() -> None:
    found = run(
        AutoscaleOptions(devices=3, prefill=1, phases=[Phase(seconds=100.0, computed=8192)])
    )
    json.dumps(found)
    said = lines(found)
    assert said[0] == "starts with 1 prefill workers of 3"
    assert [line.split(":")[0].strip() for line in said[1:]] == [
        *("80 s", "phase 1", "scaled, 2 prefill", "fixed, 1 prefill", "fixed, 2 prefill"),
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"accelerator": "h101"}, "accelerator: choose from"),
        ({"model": "Llama"}, "model: choose from"),
        ({"prefill": 8}, "prefill: at least one worker"),
    ],
)
def test_wrong_options_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoscaleOptions(**wrong)
