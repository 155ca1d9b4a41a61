"""bench restart: the table of its figures."""

from __future__ import annotations

from pshare_jax.bench.restart import AFTER, BEFORE, WITHOUT, lines


def test_table():
    def rate(median: float) -> dict[str, float]:
        return {"median": median, "low": median / 2, "high": 2 * median}

    result = {
        "options": {"tokens": 2000, "prompts": 2},
        "seconds": {BEFORE: rate(2.0), AFTER: rate(0.1), WITHOUT: rate(2.0)},
        "computed": {BEFORE: [1999, 1999], AFTER: [0, 0], WITHOUT: [1999, 1999]},
        "ratio": rate(20.0),
    }
    assert lines(result)[2:] == [
        "  after, with a store: 100 ms (50 .. 200), computed tokens [0, 0]",
        "  after, without: 2000 ms (1000 .. 4000), computed tokens [1999, 1999]",
        "  without / with: 20.0",
    ]
