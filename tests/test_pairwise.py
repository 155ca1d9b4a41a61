"""That cases left out leave no pair of values out."""

import itertools

import pytest

from tests.pairwise import pairs


@pytest.mark.parametrize(
    ("sizes", "most"), [((2, 2), 4), ((6, 3, 2), 18), ((5, 2, 2), 10), ((4, 3, 3, 2), 14)], ids=str
)
def test_every_pair_of_values_occurs_in_few_cases(sizes, most):
    factors = [[f"{i}.{value}" for value in range(size)] for i, size in enumerate(sizes)]
    cases = pairs(*factors)
    assert cases == pairs(*factors)
    for a, b in itertools.combinations(factors, 2):
        for pair in itertools.product(a, b):
            assert any(set(pair) <= set(case) for case in cases), pair
    assert len(cases) == len(set(cases)) <= most
