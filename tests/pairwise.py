"""Fewer cases than the product of all parameters: every pair of values of two of them occurs.

Compiling is what a test's time is spent on, and what breaks a kernel is seldom more than two things
that come together. `make exhaustive` runs the products.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import pytest

EXHAUSTIVE = os.environ.get("EXHAUSTIVE", "") not in ("", "0")
"""Whether all products are run."""

Case = TypeVar("Case")


def pairs(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations of the factors' values in which every pair of values of two factors occurs.

    Greedy and deterministic, in the order of the product: each next combination is the one with
    most pairs that none before it has. Values are told apart by their place.
    """
    rest = list(itertools.product(*(range(len(factor)) for factor in factors)))

    def pairs_of(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(case), 2))

    missing = set().union(*map(pairs_of, rest))
    found = []
    while missing:
        best = max(rest, key=lambda case: len(pairs_of(case) & missing))
        rest.remove(best)
        missing -= pairs_of(best)
        found.append(best)
    return [
        tuple(factor[place] for factor, place in zip(factors, case, strict=True))
        for case in sorted(found)
    ]


def pairwise(**factors: Iterable[Any]) -> pytest.MarkDecorator:
    """As a `parametrize` of each factor, but with `pairs` of their values alone."""
    values = [list(factor) for factor in factors.values()]
    cases = list(itertools.product(*values)) if EXHAUSTIVE else pairs(*values)
    return pytest.mark.parametrize(tuple(factors), cases)


def some(cases: Iterable[Case], chosen: Iterable[Case]) -> list[Case]:
    """The chosen ones of all cases, which must be among them."""
    cases, chosen = list(cases), list(chosen)
    assert all(case in cases for case in chosen), chosen
    return cases if EXHAUSTIVE else chosen
