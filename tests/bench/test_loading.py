"""bench loading: gaps between tokens, while modules are loaded and while they are not."""

import pytest

from pshare_jax.bench.loading import IDLE, LOADING, LoadingOptions, lines, summary
from pshare_jax.errors import ConfigError


def test_a_gap_counts_as_loading_if_any_of_it_was():
    gaps = [(1.0, 0.5), (2.5, 0.25), (3.125, 0.5), (4.0, 0.125)]
    found = summary(gaps, [(2.0, 3.0)])
    assert found[IDLE] == {"count": 2, "median": 312.5, "p99": pytest.approx(496.25), "max": 500.0}
    assert found[LOADING]["count"] == 2
    assert found[LOADING]["max"] == 500.0
    assert summary([], [])[LOADING] == {"count": 0, "median": 0.0, "p99": 0.0, "max": 0.0}


@pytest.mark.parametrize("options", [{"modules": []}, {"streams": 0}, {"repeats": 0}], ids=str)
def test_nothing_to_measure(options):
    with pytest.raises(ConfigError, match="at least one of each"):
        LoadingOptions(**options)


def test_table():
    gaps = {"count": 9, "median": 20.4, "p99": 31.0, "max": 40.0}
    result = {
        "gaps": {IDLE: gaps, LOADING: {**gaps, "max": 55.0}},
        "gaps_by_module": {"a": {**gaps, "median": 30.0}},
        "load_seconds": {"a": [1.0, 3.0]},
        "compiles": 0,
    }
    assert lines(result)[2:] == [
        "| idle | 20 | 31 | 40 |",
        "| loading | 20 | 31 | 55 |",
        "| a | 30 | 31 | 40 |",
        "\na: loaded in 2.0 s",
        "\nCompilations: 0",
    ]
