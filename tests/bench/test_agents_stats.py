"""Figures of a run worked out by hand."""

import sys
from dataclasses import asdict

import pytest

from pshare_jax.bench import agents_plots
from pshare_jax.bench.__main__ import main
from pshare_jax.bench.agents_calibrate import Costs
from pshare_jax.bench.agents_compare import against_limit, best_concurrency, compare
from pshare_jax.bench.agents_load import CallRecord, Load, SessionRecord, arrivals
from pshare_jax.bench.agents_stats import percentiles, prompt_origins, summary
from pshare_jax.bench.agents_workload import Workload


def call(asked: float, arrivals: list[float], end: float, cached=None, shared=None) -> CallRecord:
    return CallRecord("m", 100, 3, asked, arrivals, end, cached, shared)


def test_a_run_by_hand():
    sessions = [
        SessionRecord(10.0, 16.0, [call(10, [11, 12, 14], 14), call(14, [15.5, 16], 16)]),
        SessionRecord(12.0, 20.0, [call(12, [16, 18, 20], 20)]),
    ]
    figures = summary(sessions)
    assert (figures["seconds"], figures["calls"], figures["generated_tokens"]) == (10, 3, 9)
    assert figures["generated_tokens_per_s"] == pytest.approx(0.9)
    assert figures["calls_per_s"] == pytest.approx(0.3)
    assert figures["sessions_per_s"] == pytest.approx(0.2)
    assert figures["ttft_s"]["p50"] == 1.5
    assert figures["next_ttft_s"]["p50"] == 1.5, "one call came after a session's first"
    assert figures["inter_token_s"]["p50"] == 2  # 1, 2, 0.5, 2, 2
    assert figures["call_s"]["p95"] == pytest.approx(4 + 0.9 * 4)
    assert figures["session_s"]["p50"] == 7
    assert figures["prompt_tokens"]["computed"] is None


def test_percentiles():
    assert percentiles(range(101)) == {"p50": 50, "p95": 95, "p99": 99}
    assert percentiles([]) is None


def test_origins_of_prompts():
    calls = [call(0, [1], 1, 0, 0), call(0, [1], 1, 90, 40), call(0, [1], 1, 60, 0)]
    assert prompt_origins(calls) == {
        "total": 300,
        "computed": 150,
        "cached": 150,
        "same_model": 110,
        "other_model": 40,
    }
    unknown = prompt_origins([*calls, call(0, [1], 1, 10)])
    assert (unknown["cached"], unknown["same_model"], unknown["other_model"]) == (160, None, None)


def test_arrivals_are_a_poisson_process_decided_by_the_seed():
    times = arrivals(Load(4000, 1, 2.0, 5))
    assert times == arrivals(Load(4000, 1, 2.0, 5))
    assert times != arrivals(Load(4000, 1, 2.0, 6))
    assert times == sorted(times)
    assert times[-1] / len(times) == pytest.approx(0.5, rel=0.05)
    assert arrivals(Load(3, 1, 0.0, 5)) == [0, 0, 0]


def run(target: str, concurrency: int, turn: int, rate: float, latency: float) -> dict:
    return {
        "target": target,
        "models": 4,
        "concurrency": concurrency,
        "round": turn,
        "generated_tokens_per_s": rate,
        **{kind: {"p95": latency} for kind in ("call_s", "session_s", "ttft_s")},
    }


RUNS = [
    run("shared", 4, 1, 33.0, 1.0),
    run("shared", 4, 0, 30.0, 1.0),
    run("shared", 1, 0, 12.0, 0.5),
    run("shared", 1, 1, 12.0, 0.5),
    run("isolated", 4, 0, 6.0, 8.0),
    run("isolated", 4, 1, 6.0, 8.0),
    run("isolated", 1, 0, 10.0, 2.0),
    run("isolated", 1, 1, 10.0, 3.0),
]


def test_each_side_is_taken_at_its_best():
    assert best_concurrency(RUNS, "shared", 4) == 4
    assert best_concurrency(RUNS, "isolated", 4) == 1
    [row] = compare(RUNS, "shared", "isolated")
    assert row["best"]["concurrency"] == {"shared": 4, "isolated": 1}
    assert row["best"]["throughput"] == pytest.approx({"median": 3.15, "low": 3.0, "high": 3.3})
    assert row["best"]["p95_call_s"] == pytest.approx({"median": 2.5, "low": 2.0, "high": 3.0})
    assert row["equal_concurrency"]["4"]["throughput"]["median"] == pytest.approx(5.25)
    assert row["equal_concurrency"]["1"]["p95_session_s"]["high"] == pytest.approx(6.0)


def test_achieved_of_the_limit():
    [row] = compare(RUNS, "shared", "isolated")
    found = against_limit(row, Workload(), Costs(prefill=7.0, decode=3.0))
    assert found["rho"] == pytest.approx(5936 / 1592)
    assert found["g_max"] == pytest.approx((5936 / 1592 * 7 + 3) / 10)
    assert found["achieved_of_g_max"] == pytest.approx(3.15 / found["g_max"])


def test_plots_are_drawn_from_a_result(tmp_path):
    result = {
        "runs": [*RUNS, *({**run, "models": 8} for run in RUNS)],
        "targets": [{"name": "isolated"}, {"name": "shared"}],
        "options": {"workload": asdict(Workload())},
    }
    files = agents_plots.draw(result, tmp_path / "plots")
    assert [file.name for file in files] == ["concurrency.png", "models.png"]
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")
    one = {**result, "runs": RUNS}
    assert [file.name for file in agents_plots.draw(one, tmp_path)] == ["concurrency.png"]


def test_points_of_the_plots():
    points = agents_plots.by_concurrency(RUNS, "shared", 4)
    assert [(x, [r["generated_tokens_per_s"] for r in runs]) for x, runs in points] == [
        (1, [12, 12]),
        (4, [30, 33]),
    ]
    [(models, best)] = agents_plots.by_models(RUNS, "isolated")
    assert (models, [run["concurrency"] for run in best]) == (4, [1, 1])


def test_missing_matplotlib_is_named_before_anything_is_run(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["agents", "--urls=[http://127.0.0.1:9]", "--plots=x"]) == 2
    assert "pip install 'pshare_jax[bench]'" in capsys.readouterr().err
