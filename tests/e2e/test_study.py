"""The result in small: PrefillShare learns what full fine-tuning does; naive sharing breaks."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from pshare_jax.study import quick, runner
from pshare_jax.study.__main__ import main
from tests.helpers import optimisations
from tests.study.test_runner import train_here

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_cache_conditioned_modules_learn_where_naive_sharing_fails(tmp_path, monkeypatch, capsys):
    # What is between no sharing and all of it is of no interest here.
    monkeypatch.setattr(quick, "SHARES", (0.0, 1.0))
    # The first run has a process of its own, as all of them have; it is the same in this one.
    trainers = iter([runner.run_trainer])

    def train(command: Sequence[str]) -> int:
        with optimisations():
            return next(trainers, train_here)(command)

    monkeypatch.setattr(runner, "run_trainer", train)
    assert main(["quick", str(tmp_path)]) == 0
    results = {
        result["method"]: result["evaluations"]
        for path in (tmp_path / "results").glob("lookup-*.json")
        if (result := json.loads(path.read_text()))
    }
    accuracy = {method: found["test"]["accuracy"] for method, found in results.items()}
    assert accuracy["base"] < 0.2
    assert accuracy["full"] > 0.9
    assert accuracy["prefillshare"] > 0.9
    assert accuracy["lora"] > 0.9
    assert results["full"]["test, share 1.0"]["accuracy"] < 0.5
    assert "naive sharing" in capsys.readouterr().out
