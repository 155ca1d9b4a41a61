"""bench turns: the two engines differ in how many prompts share a call, and in nothing else."""

import pytest

from pshare_jax.bench import turns
from pshare_jax.bench.turns import ALONE, TOGETHER, TurnsOptions, lines, serve_config
from pshare_jax.core.chunk_planner import chunk_shapes
from pshare_jax.errors import ConfigError


def test_the_engines_differ_in_the_rows_of_a_call():
    options = TurnsOptions()
    alone = serve_config(options, [options.chunk])
    together = serve_config(options, [options.short_bucket, options.chunk])
    assert chunk_shapes(alone.prefill.chunk_buckets) == [(1, 512)]
    assert chunk_shapes(together.prefill.chunk_buckets) == [(1, 128), (1, 512), (4, 128)]
    assert alone.decode == together.decode
    # All sessions fit, with every turn that they append.
    tokens = options.sessions * (options.context + 6 * options.appended)
    assert (alone.prefill.num_pages - 1) * alone.page_size >= tokens


@pytest.mark.parametrize("appended", [0, 129])
def test_a_turn_that_does_not_fit_is_refused(appended):
    with pytest.raises(ConfigError, match=f"appended is {appended}.*short_bucket \\(128\\)"):
        TurnsOptions(appended=appended)


def test_table():
    rate = {"median": 1234.0, "low": 1200.0, "high": 1300.0}
    ratio = {"median": 1.5, "low": 1.4, "high": 1.6}
    result = {
        "options": {"sessions": 16, "appended": 72, "long_prompt": 2000},
        "turns": {ALONE: rate, TOGETHER: {**rate, "median": 1851.0}},
        "long": {ALONE: rate, TOGETHER: rate},
        "ratio": ratio,
        "long_ratio": {"median": 1.0, "low": 0.98, "high": 1.02},
    }
    assert lines(result)[2:] == [
        "| 16 sessions append 72 tokens at once, tokens/s | 1,234 | 1,851 | 1.50 (1.40 - 1.60) |",
        "| a prompt of 2000 tokens alone, tokens/s | 1,234 | 1,234 | 1.00 (0.98 - 1.02) |",
    ]


def test_ratios_are_of_one_repeat():
    assert turns._ratios({ALONE: [1.0, 4.0], TOGETHER: [2.0, 2.0]}) == [2.0, 0.5]
