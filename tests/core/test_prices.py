"""What is fetched and what is computed: the cheaper, with what waits before either."""

from __future__ import annotations

import pytest

from pshare_jax.core.prices import DISK, SHARED, Prices

PAGE = 32
PRICES = Prices(0.001, 1e-6, {SHARED: 0.002, DISK: 0.02}, {SHARED: 0.001, DISK: 0.05})


def pages(prices: Prices, places: list[int], *queues: float, covered: int | None = None) -> int:
    ends = [PAGE * (i + 1) for i in range(len(places))]
    whole = covered if covered is not None else ends[-1]
    return prices.pages_to_fetch(places, ends, 0, whole, *(queues or (0.0, 0.0)))


def test_computing_grows_with_the_square_of_the_position():
    assert PRICES.compute(0, 1000) == pytest.approx(1.0 + 1.0)
    assert PRICES.compute(1000, 2000) == pytest.approx(1.0 + 3.0)
    assert PRICES.compute(0, 2000) == pytest.approx(
        PRICES.compute(0, 700) + PRICES.compute(700, 2000)
    )


def test_a_call_is_paid_once_a_tier():
    assert PRICES.fetch([SHARED] * 4) == pytest.approx(0.002 + 0.004)
    assert PRICES.fetch([SHARED, DISK, SHARED]) == pytest.approx(0.022 + 0.052)


def test_what_is_cheaper_is_fetched():
    assert pages(PRICES, [SHARED] * 10) == 10
    assert pages(Prices(1e-6, 0.0, PRICES.call, PRICES.page), [SHARED] * 10) == 0


def test_only_later_pages_of_a_slow_tier_are_dear_enough():
    """Where attention makes late pages dear the whole run is fetched, of a short one nothing."""
    slow = Prices(0.0001, 1e-6, {DISK: 0.02}, {DISK: 0.03})
    assert pages(slow, [DISK] * 4) == 0
    assert pages(slow, [DISK] * 64) == 64


def test_a_run_ends_before_a_tier_that_costs_more_than_computing():
    assert pages(PRICES, [SHARED, SHARED, SHARED, DISK, DISK]) == 3


def test_queues_count():
    """Computing waits for the worker, fetching for the store; they run beside each other."""
    even = Prices(0.001, 0.0, {SHARED: 0.0}, {SHARED: 0.032})
    assert pages(even, [SHARED] * 4, 0.0, 0.0) == 0
    assert pages(even, [SHARED] * 4, 0.10, 0.0) == 4
    assert pages(even, [SHARED] * 4, 0.10, 0.12) == 0
    # What is left over must wait for the worker anyway: fetching meanwhile costs nothing.
    assert pages(even, [SHARED] * 4, 0.2, 0.0, covered=5 * PAGE) == 4
