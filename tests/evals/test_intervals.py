"""Intervals and tests of accuracies, against textbooks and brute force."""

import itertools

import numpy as np
import pytest

from pshare_jax.evals.intervals import (
    bootstrap_interval,
    item_bootstrap_interval,
    item_wilson_interval,
    mcnemar,
    paired_bootstrap_interval,
    sign_flip_test,
    wilson_interval,
)


def flags(right: int, wrong: int) -> list[bool]:
    return [True] * right + [False] * wrong


def test_the_bootstrap_is_the_one_that_resamples_answers():
    correct = flags(30, 20)
    rng = np.random.default_rng(1)
    resampled = rng.choice(correct, (20_000, 50)).mean(axis=1)
    expected = np.quantile(resampled, [0.025, 0.975])
    assert bootstrap_interval(correct) == pytest.approx(expected, abs=0.011)
    assert bootstrap_interval(correct) == bootstrap_interval(correct)
    low, high = bootstrap_interval(correct, confidence=0.5)
    assert 0.45 < bootstrap_interval(correct)[0] < low < 0.6 < high < 0.74


def test_the_paired_bootstrap_is_the_one_that_resamples_pairs():
    a = np.array(flags(30, 70))
    b = a.copy()
    b[20:45] = True
    b[:5] = False
    rows = np.random.default_rng(1).integers(0, 100, (20_000, 100))
    resampled = b[rows].mean(axis=1) - a[rows].mean(axis=1)
    expected = np.quantile(resampled, [0.025, 0.975])
    interval = paired_bootstrap_interval(a.tolist(), b.tolist())
    assert interval == pytest.approx(expected, abs=0.011)
    assert interval[0] < 0.1 < interval[1]
    assert paired_bootstrap_interval(a.tolist(), a.tolist()) == (0.0, 0.0)


def test_the_item_bootstrap_is_the_one_that_resamples_items():
    values = np.linspace(-1, 1, 40) ** 3
    rows = np.random.default_rng(1).integers(0, 40, (20_000, 40))
    expected = np.quantile(values[rows].mean(axis=1), [0.025, 0.975])
    assert item_bootstrap_interval(values.tolist()) == pytest.approx(expected, abs=0.011)
    # Of flags it is the other one.
    correct = flags(30, 20)
    interval = item_bootstrap_interval(correct)
    assert interval == pytest.approx(bootstrap_interval(correct), abs=0.011)
    with pytest.raises(ValueError, match="no values"):
        item_bootstrap_interval([])


def test_wilson():
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    assert wilson_interval(flags(81, 182)) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(flags(15, 133)) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(flags(0, 20)) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(flags(1, 28)) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson_interval(flags(20, 0))[1] == 1.0


def test_runs_on_the_same_items_count_as_far_as_they_differ():
    right, wrong = [1.0] * 30, [0.0] * 20
    one = wilson_interval(flags(30, 20))
    # Two runs that answer alike are one; two that answer independently are twice as many items.
    assert item_wilson_interval(right + wrong) == pytest.approx(one)
    apart = [1.0] * 18 + [0.5] * 24 + [0.0] * 8
    assert item_wilson_interval(apart, runs=2) == pytest.approx(
        wilson_interval(flags(60, 40)), abs=1e-6
    )
    assert item_wilson_interval([1.0] * 20) == pytest.approx(wilson_interval(flags(20, 0)))
    with pytest.raises(ValueError, match="no values"):
        item_wilson_interval([])


def test_runs_that_differ_evenly_count_for_no_more_than_there_are():
    values = [0.5] * 9 + [1.0]
    twice = wilson_interval(flags(11, 9))
    assert item_wilson_interval(values, runs=2) == pytest.approx(twice, abs=1e-6)
    assert item_wilson_interval(values)[0] < twice[0]


def test_the_sign_flip_test_of_two_runs_is_mcnemars():
    a, b = flags(10, 10), [*flags(0, 1), *flags(15, 4)]
    differences = [float(x) - float(y) for x, y in zip(b, a, strict=True)]
    assert sign_flip_test(differences) == pytest.approx(mcnemar(a, b).p_value)
    assert sign_flip_test([0.0, 0.0]) == sign_flip_test([1.0, -1.0]) == 1.0
    assert sign_flip_test([-1.0] * 300) == pytest.approx(2.0**-299, rel=1e-9)


def test_the_sign_flip_test_weighs_how_much_items_differ():
    differences = [1.0, 2 / 3, 1 / 3, -1 / 3, 0.1 + 0.2 - 0.3]
    signs = np.array(list(itertools.product([-1, 1], repeat=5)))
    means = signs @ np.array([3, 2, 1, -1, 0])
    expected = np.mean(np.abs(means) >= 5)
    assert sign_flip_test(differences, runs=3) == pytest.approx(expected)
    # One of three runs worse on three items, all three better on one: neither is ahead.
    assert sign_flip_test([1.0, -1 / 3, -1 / 3, -1 / 3], runs=3) == 1.0


def test_mcnemar_is_the_sign_test_of_what_differs():
    a = flags(10, 10)
    b = [not flag for flag in a[:1]] + a[1:14] + [True] * 6
    result = mcnemar(a, b)
    assert (result.only_a, result.only_b) == (1, 6)
    # Two-sided: (C(7,0) + C(7,1)) * 2 / 2**7.
    assert result.p_value == pytest.approx(16 / 128)
    assert mcnemar(b, a).p_value == result.p_value
    assert mcnemar(a, a).p_value == 1.0
    assert mcnemar(flags(0, 100), flags(100, 0)).p_value < 1e-29


@pytest.mark.parametrize("function", [bootstrap_interval, wilson_interval])
def test_no_answers(function):
    with pytest.raises(ValueError, match="no answers"):
        function([])


@pytest.mark.parametrize("function", [paired_bootstrap_interval, mcnemar])
def test_unpaired_answers(function):
    with pytest.raises(ValueError, match="1 answers cannot be paired with 2"):
        function([True], [True, False])
