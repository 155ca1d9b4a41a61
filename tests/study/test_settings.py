"""What was made with other settings, other items or fewer steps is never taken for a run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pshare_jax.config_files import load_config
from pshare_jax.errors import ConfigError, DataError
from pshare_jax.study import runner
from pshare_jax.study.config import Runs, StudyConfig, TaskConfig, expand
from pshare_jax.study.runner import Study
from pshare_jax.train.report import Reporter

ROOT = Path(__file__).parents[2]
# SmolLM2-135M's fingerprint and the one that it had before the fingerprint left defaults out.
BASES = (
    "fcce76882859019348401c33547ccd4cfce1302ea8b8dc01b61e7f985efc3deb",
    "054284df2a3c5dea1a309a2ed28bb78bb4fef610560628fedfe22defded659e7",
)
FULL = Runs("code", "full", 8, [1e-3], test=True)
LORA = Runs("code", "lora", 16, [1e-3])


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


class Trainer:
    """Writes the record of a training run instead of making it; remembers what it was asked."""

    def __init__(self):
        self.asked: list[dict[str, str]] = []
        self.missing_steps = 0

    def __call__(self, command: list[str]) -> int:
        flags = dict(flag.removeprefix("--").split("=", 1) for flag in command[3:])
        self.asked.append(flags)
        record = {
            "steps": int(flags["optimizer.max_steps"]) - self.missing_steps,
            **dict.fromkeys(("data", "train_loss", "step_seconds", "kv_batch_seconds", "packages")),
        }
        path = Path(flags["output"]) / "decode_module" / "training.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
        return 0


def named(base: str) -> SimpleNamespace:
    """The manifest of a base, which an earlier version called `former BASE`."""
    current = {f"former {base}": base}
    return SimpleNamespace(fingerprint=base, current=lambda name: current.get(name, name))


@pytest.fixture
def trainer(monkeypatch) -> Trainer:
    trainer = Trainer()
    monkeypatch.setattr(runner, "run_trainer", trainer)
    monkeypatch.setattr(runner, "read_manifest", named)
    monkeypatch.setattr(Study, "_evaluate", lambda self, *_: {"accuracy": 1.0, "correct": "1"})
    return trainer


@pytest.fixture
def config(tmp_path, trainer) -> StudyConfig:
    """Finished: full fine-tuning and LoRA."""
    config = StudyConfig(
        base="b0",
        folder=str(tmp_path / "work"),
        results=str(tmp_path / "results"),
        tasks=[TaskConfig("code", 24, 4, 6, 4)],
        runs=[FULL, LORA],
        batch_size=4,
        lora_rank=2,
    )
    make(config)
    return config


def make(config: StudyConfig, **changes: Any) -> None:
    Study(dataclasses.replace(config, **changes), Reporter(active=False)).make()


def test_a_result_keeps_what_decided_it(config, trainer):
    results = Path(config.results)
    assert read(results / "code-lora-0.001-16-0.json")["settings"] == {
        "base": "b0",
        "mode": "cache-conditioned",
        "dtype": "float32",
        "tail": 1,
        "seed": 0,
        "data.max_length": 1024,
        "lora.rank": 2,
        "optimizer.learning_rate": 0.001,
        "optimizer.batch_size": 4,
        "optimizer.max_steps": 4,
        "max_tokens": 4,
    }
    full = read(results / "code-full-0.001-8-0.json")["settings"]
    assert (full["mode"], full["lora.rank"], full["optimizer.max_steps"]) == ("full", 0, 2)
    assert read(results / "code-base.json")["settings"] == {"base": "b0", "max_tokens": 4}
    # The trainer was asked for the very same.
    assert [flags["mode"] for flags in trainer.asked] == ["full", "cache-conditioned"]
    assert trainer.asked[1]["lora.rank"] == "2"
    assert trainer.asked[1]["optimizer.max_steps"] == "4"
    make(config)
    assert len(trainer.asked) == 2


def test_a_result_that_names_its_base_as_earlier_versions_did(config, trainer):
    for path in Path(config.results).glob("code-*.json"):
        path.write_text(path.read_text().replace('"b0"', '"former b0"'))
    make(config)
    assert len(trainer.asked) == 2
    with pytest.raises(DataError, match="base 'former b0', but the configuration says 'b1'"):
        make(config, base="b1")


@pytest.mark.parametrize(
    ("changes", "file", "message"),
    [
        ({"batch_size": 8}, "code-full-0.001-8-0", "optimizer.batch_size 4.* says 8;"),
        ({"dtype": "bfloat16"}, "code-full-0.001-8-0", "dtype 'float32'.* says 'bfloat16'"),
        # Full fine-tuning has no rank.
        ({"lora_rank": 4}, "code-lora-0.001-16-0", "lora.rank 2.* says 4;"),
        ({"max_length": 512}, "code-full-0.001-8-0", "data.max_length 1024.* says 512;"),
        ({"base": "b1"}, "code-base", "base 'b0'.* says 'b1'"),
        ({"tasks": [TaskConfig("code", 24, 4, 6, 5)]}, "code-base", "max_tokens 4.* says 5;"),
        (
            {"runs": [dataclasses.replace(FULL, shares=[0.5])]},
            "code-full-0.001-8-0",
            "has no evaluation 'test, share 0.5'",
        ),
    ],
)
def test_other_settings_are_named_with_the_file(config, trainer, changes, file, message):
    with pytest.raises(DataError, match=f"{file}.json: .*{message}"):
        make(config, **changes)
    assert len(trainer.asked) == 2


def test_a_result_that_does_not_say_is_not_taken(config):
    path = Path(config.results) / "code-full-0.001-8-0.json"
    result = read(path)
    del result["settings"]
    path.write_text(json.dumps(result))
    with pytest.raises(DataError, match="made with base None, but the configuration says 'b0'"):
        make(config)


def test_fewer_steps_than_the_examples_take(config, trainer):
    """As a training set that holds fewer examples than were asked for gives them."""
    trainer.missing_steps = 1
    more = dataclasses.replace(FULL, examples=24)
    message = r"code-full-0.001-24-0: was trained for 5 steps, but examples: 24 takes 6; remove it"
    with pytest.raises(DataError, match=message):
        make(config, runs=[more])
    assert not (Path(config.results) / "code-full-0.001-24-0.json").exists()


def test_more_examples_than_there_are_items(config, trainer):
    more = dataclasses.replace(FULL, examples=28)
    with pytest.raises(DataError, match="code, full: examples is 28, but 24 training items"):
        make(config, runs=[LORA, more])
    assert len(trainer.asked) == 2


@pytest.mark.parametrize("examples", [0, 2, 18])
def test_examples_are_whole_steps(config, examples):
    with pytest.raises(ConfigError, match=f"examples is {examples}; .* multiple of batch_size, 4"):
        dataclasses.replace(config, runs=[dataclasses.replace(FULL, examples=examples)])


def test_what_is_chosen_by_the_validation_set_needs_it():
    """A run whose settings are given is evaluated on the test set alone."""
    assert set(Runs("code", "lora", 8, test=True, validation=False).evaluations) == {"test"}
    for other in ({}, {"test": True, "recompute": [(0, 1)]}):
        with pytest.raises(ConfigError, match="code, full: validation may be false only beside"):
            Runs("code", "full", 8, validation=False, **other)


def test_a_run_of_no_task(config):
    with pytest.raises(ConfigError, match="no task 'math'"):
        dataclasses.replace(config, runs=[Runs("math", "full", 8)])


def test_other_sizes_than_the_items_were_made_with(config):
    task = dataclasses.replace(config.tasks[0], test=7)
    message = r"tasks.json: code: test was made with 6, not 7, .* remove .*work/data/code and"
    with pytest.raises(DataError, match=message):
        make(config, tasks=[task])
    # Doing what it says helps.
    shutil.rmtree(Path(config.folder) / "data" / "code")
    shutil.rmtree(config.results)
    make(config, tasks=[task])
    assert read(Path(config.results) / "tasks.json")["code"]["test"]["items"] == 7


def test_items_that_are_not_those_of_the_results(config):
    path = Path(config.folder) / "data" / "code" / "train.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    message = r"train.jsonl: is not the file whose hash .*; remove .*code"
    with pytest.raises(DataError, match=message):
        make(config)
    shutil.rmtree(path.parent)
    make(config)
    assert path.read_text().splitlines(keepends=True) == lines


def test_items_that_are_there_in_part_are_made_again(config):
    folder = Path(config.folder) / "data" / "code"
    before = (folder / "validation.jsonl").read_text()
    (folder / "validation.jsonl").unlink()
    make(config)
    assert (folder / "validation.jsonl").read_text() == before


def test_a_task_that_is_not_there(config):
    with pytest.raises(ConfigError, match="there is no task 'poems'; there are family, math, code"):
        make(config, tasks=[*config.tasks, TaskConfig("poems", 1, 1, 1, 1)])


def test_the_committed_results_are_those_of_the_configuration(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(StudyConfig, ["--config=configs/study/smollm2-135m.yaml"], "study")
    results = Path(config.results)
    tasks = read(results / "tasks.json")
    for task in config.tasks:
        sizes = [tasks[task.name][split]["asked"] for split in ("train", "validation", "test")]
        assert sizes == [task.train, task.validation, task.test]
    study = Study(config, Reporter(active=False))
    found = set()
    for runs in config.runs:
        best = None if runs.learning_rates else study.best_rate(runs)
        if not runs.learning_rates and best is None:
            continue  # its learning rate has not been chosen yet
        for run in expand(runs, best):
            path = results / f"{run.name}.json"
            if not path.is_file():
                continue
            found.add(path)
            result = read(path)
            base = result["settings"]["base"]
            assert base in BASES
            assert result["settings"] == run.settings(config, base)
            assert result["training"]["steps"] * config.batch_size == runs.examples
            assert result["training"]["data"]["train_sha256"] == tasks[runs.task]["train"]["sha256"]
            assert set(result["evaluations"]) >= set(runs.evaluations)
    assert len(found) >= 22
