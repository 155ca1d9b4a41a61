"""bench masks: what it compares, and how it is written."""

from pshare_jax.bench import masks
from pshare_jax.bench.masks import FREE, MASKED, lines


def test_costs_are_of_one_repeat():
    assert masks._costs([10.0, 8.0], [5.0, 8.0]) == [2.0, 1.0]


def test_table():
    rate = {"median": 900.0, "low": 850.0, "high": 950.0}
    cost = {"median": 1.05, "low": 1.0, "high": 1.1}
    result = {
        "options": {"context": 32, "batch": 8, "clock": "cpu"},
        "rates": {"greedy": {FREE: rate, MASKED: {**rate, "median": 857.0}}},
        "cost": {"greedy": cost},
        "least_cost": {"greedy": 1.04},
    }
    assert "tokens/s of processor time" in lines(result)[0]
    assert lines(result)[2:] == ["| greedy | 900 | 857 | 1.05 (1.00 - 1.10) times | 1.04 |"]
