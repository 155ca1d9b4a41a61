"""What frontends say, as the policy of autoscaling sees it."""

from __future__ import annotations

import msgspec
import pytest

from pshare_jax.core.autoscale import Capacity, Observation
from pshare_jax.core.load import Load, Observer, load_of
from pshare_jax.core.stats import EngineStats, PoolStats

FIRST = Load(7, 0, 0, 1000, 2.0, 10, 400, 2)
SECOND = Load(7, 600, 3, 5000, 4.0, 30, 400, 2)


def test_a_load_is_what_workers_have_said_and_a_frontend_waits_for() -> None:
    stats = EngineStats(
        prefill_tokens={("a", "computed"): 5, ("a", "other_model"): 50, ("b", "computed"): 2},
        busy_seconds={"prefill0": 1.5, "prefill1": 0.5, "decode0": 9.0},
        pools={
            "prefill0": PoolStats(90, 0, 80, 0, 10),
            "decode0": PoolStats(40, 30, 6, 0, 4),
            "decode.x1": PoolStats(40, 20, 8, 0, 12),
        },
    )
    assert load_of(stats, 3, 100, 4) == Load(3, 100, 4, 7, 2.0, 14, 80, 2)


def test_rates_are_of_the_time_between_two_looks() -> None:
    observer = Observer(0.0, 8.0)
    assert observer.observe(10.0, [FIRST]) is None
    other = Load(9, 400, 2, 99, 99.0)
    # 4,000 tokens in 5 seconds, for which a worker has worked 2; what waits is added up.
    seen = observer.observe(15.0, [SECOND, other])
    assert seen == (Observation(15.0, 800.0, 1000, 5, 30), Capacity(2000.0, 8.0, 200.0))


@pytest.mark.parametrize(
    "change",
    [
        {"incarnation": 8},
        {"computed_tokens": 999},
        {"prefill_seconds": 1.0},
        {"decode_workers": 0},
    ],
)
def test_what_cannot_be_compared_is_not(change: dict[str, float]) -> None:
    observer = Observer(0.0, 8.0)
    observer.observe(10.0, [FIRST])
    observer.observe(15.0, [SECOND])
    later = msgspec.structs.replace(SECOND, **change)
    assert observer.observe(20.0, [later]) is None


def test_nothing_is_known_of_workers_that_have_not_worked() -> None:
    observer = Observer(0.0, 8.0)
    assert observer.observe(0.0, [FIRST]) is None
    assert observer.observe(5.0, [FIRST]) is None
    # Unless somebody has told.
    told = Observer(500.0, 8.0)
    told.observe(0.0, [FIRST])
    seen = told.observe(5.0, [SECOND])
    assert seen is not None
    assert seen[1].prefill_tokens_per_s == 500.0


def test_what_is_learned_changes_with_the_time_that_it_was_seen_for() -> None:
    observer = Observer(0.0, 8.0)
    load = FIRST
    rates = []
    for second, rate in enumerate((1000, 4000, 4000)):
        observer.observe(2.0 * second, [load])
        load = msgspec.structs.replace(
            load,
            computed_tokens=load.computed_tokens + 15 * rate,
            prefill_seconds=load.prefill_seconds + 15.0,
        )
        seen = observer.observe(2.0 * second + 1, [load])
        assert seen is not None
        rates.append(seen[1].prefill_tokens_per_s)
    assert rates == [1000.0, 2500.0, 3250.0]
