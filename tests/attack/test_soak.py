"""`make soak` in small: a real server under mixed traffic, and nothing of it grows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pshare_jax.bench import soak
from pshare_jax.bench.soak_options import SoakOptions
from tests.e2e.conftest import tiny_folder, write_config  # noqa: F401 (a fixture)

MINUTES = float(os.environ.get("SOAK_MINUTES", "0.1"))


@pytest.mark.timeout(MINUTES * 60 + 300)
def test_nothing_grows_and_answers_are_those_of_the_request_alone(tiny_folder: Path):  # noqa: F811
    options = SoakOptions(
        config=str(write_config(tiny_folder, max_model_len=2048)),
        minutes=MINUTES,
        clients=6,
        probes=12,
        longest_prompt=60,
        longest_answer=24,
        hot=["critic"],
        seconds_between_samples=0.5,
    )
    result = soak.run(options)
    lost = {name: found for name, found in result["verdicts"].items() if not found["kept"]}
    assert not lost, (lost, result["faults"])
    kinds = {"probe", "session", "drop", "slow", "samples", "nonsense", "hot"}
    assert set(result["requests"]) == kinds
