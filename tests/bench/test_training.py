"""`bench train`: every way to train is measured, in turn, with the steps that were asked for."""

from __future__ import annotations

import json

import pytest

from pshare_jax.bench import training
from pshare_jax.bench.__main__ import main
from pshare_jax.train import loop
from tests.train.helpers import SHALLOW, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"), SHALLOW)


def test_every_way_is_measured(base, tmp_path, monkeypatch, capsys):
    seen = []
    real = loop.train

    def train(config, reporter):
        record = real(config, reporter)
        seen.append((config, record))
        # A clock that can be told apart.
        return {**record, "step_seconds": float(len(seen))}

    monkeypatch.setattr(loop, "train", train)
    file = tmp_path / "result.json"
    options = "--prompt_words=[6,12] --batch_size=2 --steps=2 --rounds=2 --tail=3 --lora_rank=2"
    arguments = [*options.split(), "--dtype=float32", "--compilation_cache_dir="]
    assert main(["train", f"--base={base}", *arguments, f"--json={file}"]) == 0

    # Rounds go through all lengths and ways in turn.
    first = seen[:6]
    assert [config.mode for config, _ in first] == ["full"] + 5 * ["cache-conditioned"]
    assert [config.tail for config, _ in first] == [1, 1, 1, 3, 1, 1]
    assert [config.lora.rank for config, _ in first] == [0, 0, 0, 0, 2, 2]
    kept = [record["kv_batch_seconds"] is not None for _, record in first]
    assert kept == [False, True, False, True, True, False]
    for _, record in seen:
        assert record["steps"] == 3
        assert record["data"]["train_examples"] == 6
        assert record["config"]["optimizer"]["batch_size"] == 2

    result = json.loads(file.read_text())
    rows = result["steps"]
    assert [row["way"] for row in rows[:6]] == [row["way"] for row in rows[6:]]
    assert [row["prompt_tokens"] for row in rows] == 6 * [6] + 6 * [12]
    assert (rows[0]["low"], rows[0]["median"], rows[0]["high"]) == (1, 7, 13)
    assert (rows[11]["low"], rows[11]["median"], rows[11]["high"]) == (12, 18, 24)
    assert result["machine"]["packages"]["jax"]
    line = next(text for text in capsys.readouterr().out.splitlines() if "LoRA " in text)
    assert line.replace("│", "").split()[-4:] == ["11.000", "5.000", "17.000", "157%"]


def test_kv_that_is_not_kept_is_not_taken_for_kept(base, monkeypatch, capsys):
    monkeypatch.setattr(training, "_MEMORY_GB", 1e-9)
    options = "--prompt_words=[6] --batch_size=2 --steps=1 --rounds=1 --compilation_cache_dir="
    assert main(["train", f"--base={base}", "--dtype=float32", *options.split()]) == 2
    assert "the base's KV of a run takes more than 1e-09 GB" in capsys.readouterr().err


def test_there_must_be_something_to_measure(capsys):
    assert main(["train", "--steps=0"]) == 2
    assert "must be at least 1" in capsys.readouterr().err


def test_a_step_of_full_fine_tuning_is_what_others_are_compared_with():
    row = {"prompt_tokens": 5, "low": 1.0, "high": 1.0}
    steps = [
        {**row, "way": training.FULL, "median": 2.0},
        {**row, "way": "other", "median": 0.5},
    ]
    table = training.table({"options": {"base": "b", "batch_size": 1}, "steps": steps})
    assert list(table.columns[-1].cells) == ["100%", "25%"]
