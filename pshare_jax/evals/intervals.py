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
    values = _flags(correct)
    size, share = values.size, float(values.mean())
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
    from scipy.special import bdtr  # scipy.stats takes a second to import

    first, second = _pair(a, b)
    only_a, only_b = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    # Either split is as likely as its mirror image; an even one is as even as can be.
    as_uneven = 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5))
    return McNemar(only_a, only_b, min(as_uneven, 1.0))


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
