"""How sure accuracies and their differences are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Interval = tuple[float, float]
RESAMPLES = 10_000


@dataclass(frozen=True)
class McNemar:
    """McNemar's test of two methods on the same items.

    Args:
        only_a: items that only the first method answered rightly.
        only_b: items that only the second did.
        p_value: two-sided and exact: how likely so uneven a split, or a more uneven one, would be
            if both methods were equally good.
    """

    only_a: int
    only_b: int
    p_value: float


def bootstrap_interval(
    correct: Sequence[bool], *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of an accuracy.

    Resampling n answers of which k are right gives a binomial number of right ones, so each of the
    10,000 resamples is one draw of it.

    Raises:
        ValueError: there are no answers.
    """
    values = _flags(correct)
    draws = np.random.default_rng(seed).binomial(values.size, values.mean(), RESAMPLES)
    return _percentiles(draws / values.size, confidence)


def paired_bootstrap_interval(
    a: Sequence[bool], b: Sequence[bool], *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of accuracy b - accuracy a, items resampled in pairs.

    Raises:
        ValueError: there are no answers, or not as many of one as of the other.
    """
    first, second = _pair(a, b)
    size = first.size
    better, worse = np.sum(second & ~first), np.sum(first & ~second)
    shares = np.array([better, worse, size - better - worse]) / size
    draws = np.random.default_rng(seed).multinomial(size, shares, RESAMPLES)
    return _percentiles((draws[:, 0] - draws[:, 1]) / size, confidence)


def item_bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of a mean over items.

    For what several runs did on the same items: those of one item are not independent, so their
    mean, or the difference of two runs' means, is one value, and items are resampled.

    Raises:
        ValueError: there are no values.
    """
    array = np.asarray(values, np.float64)
    if array.size == 0:
        raise ValueError("there are no values")
    # How often each item is drawn: no array of resamples times items of single draws.
    counts = np.random.default_rng(seed).multinomial(
        array.size, np.full(array.size, 1 / array.size), RESAMPLES
    )
    return _percentiles(counts @ array / array.size, confidence)


def wilson_interval(correct: Sequence[bool], *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of an accuracy.

    Unlike the bootstrap's it is not empty where all answers are right, or none.

    Raises:
        ValueError: there are no answers.
    """
    return item_wilson_interval(_flags(correct).tolist(), confidence=confidence)


def item_wilson_interval(
    values: Sequence[float], *, runs: int = 1, confidence: float = 0.95
) -> Interval:
    """Wilson's score interval of a mean over items of shares, 0 to 1.

    For several runs on the same items, a share is that of the runs that were right. Runs count for
    as many answers as make their mean vary as it does from item to item (Kish's effective sample
    size): for no more than one run where all of them answer alike, and never for more than there
    are.

    Args:
        values: one an item.
        runs: how many of them a value is the mean of.
        confidence: of the interval.

    Raises:
        ValueError: there are no values.
    """
    array = np.asarray(values, np.float64)
    if array.size == 0:
        raise ValueError("there are no values")
    share, variance = float(array.mean()), float(array.var())
    # Values that are all the same tell nothing of how runs vary: each item counts once.
    size = array.size * (share * (1 - share) / variance if variance > 1e-12 else 1.0)
    size = min(size, float(array.size * runs))
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (share + z * z / (2 * size)) / (1 + z * z / size)
    half = z * math.sqrt(share * (1 - share) / size + z * z / (4 * size * size))
    half /= 1 + z * z / size
    # Rounding must not leave the accuracy itself outside.
    return min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> McNemar:
    """McNemar's exact test: does one method answer more items rightly than the other?

    Raises:
        ValueError: there are no answers, or not as many of one as of the other.
    """
    first, second = _pair(a, b)
    only_a, only_b = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    return McNemar(only_a, only_b, _as_uneven(only_a, only_b))


def sign_flip_test(differences: Sequence[float], *, runs: int = 1) -> float:
    """The exact two-sided p-value of a mean difference over items (Fisher's permutation test).

    How likely a mean is that is at least as far from 0, if each item's difference were as likely to
    be the other way round.

    Args:
        differences: one an item. Of two runs' answers, 1, 0 or -1 each, the test is McNemar's.
        runs: how many such a value is the mean of.
    """
    units = np.rint(np.asarray(differences, np.float64) * runs).astype(int)
    total, seen = int(np.abs(units).sum()), abs(int(units.sum()))
    # Of each sum, from -total on.
    chances = np.zeros(2 * total + 1)
    chances[total] = 1.0
    for unit in np.abs(units[units != 0]).tolist():
        chances = (np.roll(chances, unit) + np.roll(chances, -unit)) / 2
    beyond = chances[total + seen :].sum() + chances[: total - seen + 1].sum()
    return min(float(beyond), 1.0)


def _as_uneven(first: int, second: int) -> float:
    """How likely a split is that is at least as uneven, if both sides are equally likely."""
    from scipy.special import bdtr  # scipy.stats takes a second to import

    # Either split is as likely as its mirror image; an even one is as even as can be.
    return min(2 * float(bdtr(min(first, second), first + second, 0.5)), 1.0)


def _flags(correct: Sequence[bool]) -> np.ndarray:
    values = np.asarray(correct, bool)
    if values.size == 0:
        raise ValueError("there are no answers")
    return values


def _pair(a: Sequence[bool], b: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    first, second = _flags(a), _flags(b)
    if first.size != second.size:
        raise ValueError(f"{first.size} answers cannot be paired with {second.size}")
    return first, second


def _percentiles(draws: np.ndarray, confidence: float) -> Interval:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
