"""A small study from its data to its report, on a tiny base."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pshare_jax.config_files import load_config
from pshare_jax.convert.files import replace_section
from pshare_jax.errors import ConfigError
from pshare_jax.study import plots, report, runner
from pshare_jax.study.config import AS_SERVED, SHARES, Runs, StudyConfig, TaskConfig, expand
from pshare_jax.study.runner import Study
from pshare_jax.train import generate
from pshare_jax.train.__main__ import main as train_main
from pshare_jax.train.report import Reporter
from tests.train.helpers import SHALLOW, write_base

ROOT = Path(__file__).parents[2]

TASK = TaskConfig("code", 24, 4, 6, 4)


def train_here(command: Sequence[str]) -> int:
    """In this process, in one shape and without measuring the machine; one of the quick study has
    its own."""
    assert list(command[:3]) == [sys.executable, "-m", "pshare_jax.train"]
    return train_main([*command[3:], "--data.buckets=1", "--report.peak_tflops=1"])


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> StudyConfig:
    """Finished: two learning rates of PrefillShare, the better one with LoRA, and full."""
    folder = tmp_path_factory.mktemp("study")
    base = write_base(folder, SHALLOW)
    config = StudyConfig(
        base=str(base),
        folder=str(folder / "work"),
        results=str(folder / "results"),
        tasks=[TASK],
        runs=[
            Runs("code", "prefillshare", 8, [1e-3, 1e-2]),
            Runs("code", "prefillshare", 16, test=True),
            Runs("code", "full", 8, [1e-3], test=True, shares=list(SHARES), keep=True),
            Runs("code", "lora", 8, [1e-3], test=True),
        ],
        batch_size=4,
        eval_batch_size=8,
        lora_rank=2,
        kv_cache_gb=1,
        as_served=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_trainer", train_here)
        # Prompts of all lengths are answered in one shape.
        patch.setattr(generate, "_PROMPT_MULTIPLE", 256)
        Study(config, Reporter(active=False)).make()
    return config


@pytest.mark.slow
def test_every_run_leaves_a_result(study):
    results = {p.name: json.loads(p.read_text()) for p in Path(study.results).glob("*.json")}
    assert len(results) == 1 + 1 + 5
    assert results["tasks.json"]["code"]["overlap"] == 0
    full = results["code-full-0.001-8-0.json"]
    assert set(full["evaluations"]) == {
        "validation",
        "test",
        *(f"test, share {share}" for share in (0.0, 0.25, 0.5, 0.75, 1.0)),
        AS_SERVED,
    }
    # An ordinary fine-tune reads its prompt itself.
    assert (
        full["evaluations"]["test"]["correct"] == full["evaluations"]["test, share 0.0"]["correct"]
    )
    assert len(full["evaluations"]["test"]["correct"]) == TASK.test
    # It is served so too.
    lora = results["code-lora-0.001-8-0.json"]
    for made, same in ((full, "test, share 0.0"), (lora, "test")):
        served, own = made["evaluations"][AS_SERVED], made["evaluations"][same]
        assert served["first_answers"] == own["first_answers"]
        assert served["saved"] == own["saved"]
    assert full["training"]["steps"] == 2
    assert full["machine"]["packages"]["jax"]
    assert "test" not in results["code-prefillshare-0.001-8-0.json"]["evaluations"]
    # Weights are kept where that was asked for.
    kept = [path.name for path in (Path(study.folder) / "models").iterdir()]
    assert kept == ["code-full-0.001-8-0"]
    # The base's KV is kept until the last run on a task.
    assert not (Path(study.folder) / "kv" / "code").exists()


@pytest.mark.slow
def test_finished_runs_are_not_made_again(study, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was run again")

    monkeypatch.setattr(runner, "run_trainer", refuse)
    monkeypatch.setattr(Study, "_evaluate", refuse)
    Study(study, Reporter(active=False)).make()


@pytest.mark.slow
def test_the_report_shows_every_result(study, tmp_path):
    document = tmp_path / "training.md"
    document.write_text("before\n<!-- study: begin -->\nold\n<!-- study: end -->\nafter\n")
    results = report.read_results(Path(study.results))
    replace_section(document, "study", report.tables(results))
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    names = [
        "base, not trained",
        "full fine-tuning",
        "naive sharing (full fine-tuning)",
        "PrefillShare, all weights, tail 1",
        "PrefillShare, LoRA, tail 1",
    ]
    lines = [line.split("|")[1].strip() for line in text.splitlines() if "| 1 | " in line]
    assert [line for line in lines if not line.startswith("layers")][:5] == names
    assert plots.plot_shares(results, "code", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def result(rate: float, accuracy: float, examples: int, tail: int = 1) -> dict:
    return {
        "task": "t",
        "method": "full",
        "learning_rate": rate,
        "examples": examples,
        "seed": 0,
        "tail": tail,
        "evaluations": {"validation": {"accuracy": accuracy}},
    }


def test_the_best_rate_is_that_of_the_sweep(tmp_path):
    config = StudyConfig("base", "work", str(tmp_path), [], [])
    study = Study(config, Reporter(active=False))
    runs = Runs("t", "full", 100)
    assert study.best_rate(runs) is None
    # The sweep has the fewest examples; a longer run is better but tells nothing about rates.
    for rate, accuracy, examples in ((1e-4, 0.3, 10), (1e-3, 0.5, 10), (1e-2, 0.9, 100)):
        made = result(rate, accuracy, examples)
        (tmp_path / f"t-full-{rate:g}-{examples}-0.json").write_text(json.dumps(made))
    # Runs whose rate was given are not evaluated on the validation set.
    given = {**result(3e-4, 0, 10), "evaluations": {"test": {"accuracy": 1.0}}}
    (tmp_path / "t-full-0.0003-10-1.json").write_text(json.dumps(given))
    assert study.best_rate(runs) == 1e-3
    assert [run.name for run in expand(runs, 1e-3)] == ["t-full-0.001-100-0"]


def test_runs_of_a_longer_tail_tell_no_rate(tmp_path):
    """Also when they have the fewest examples: the sweep is that of a tail of 1."""
    study = Study(StudyConfig("base", "work", str(tmp_path), [], []), Reporter(active=False))
    runs = Runs("t", "full", 100, tail=8)
    (tmp_path / "t-full-tail8-0.01-5-0.json").write_text(json.dumps(result(1e-2, 0.9, 5, tail=8)))
    assert study.best_rate(runs) is None
    (tmp_path / "t-full-0.001-10-0.json").write_text(json.dumps(result(1e-3, 0.5, 10)))
    assert study.best_rate(runs) == 1e-3


def test_a_rate_that_nothing_tells():
    with pytest.raises(ConfigError, match="t, lora: learning_rates is empty"):
        list(expand(Runs("t", "lora", 1), None))


def test_names_tell_tails_apart():
    [run] = expand(Runs("t", "prefillshare", 16, [3e-4], [2], tail=8), None)
    assert run.name == "t-prefillshare-tail8-0.0003-16-2"


def test_the_committed_modules_are_runs_of_the_study(monkeypatch):
    monkeypatch.chdir(ROOT)
    whole, modules = (
        load_config(StudyConfig, ["--config", f"configs/study/{name}.yaml"], "study")
        for name in ("smollm2-135m", "modules")
    )
    for field in ("base", "dtype", "batch_size", "lora_rank", "max_length"):
        assert getattr(modules, field) == getattr(whole, field)
    study = Study(whole, Reporter(active=False))
    names = {
        run.name
        for runs in whole.runs
        if runs.learning_rates or study.best_rate(runs) is not None
        for run in expand(runs, None if runs.learning_rates else study.best_rate(runs))
    }
    for runs in modules.runs:
        assert modules.task(runs.task) == whole.task(runs.task)
        [run] = expand(runs, None)
        assert run.name in names
        assert (ROOT / "modules/smollm2-135m" / runs.task / "adapter_model.safetensors").is_file()
    # They are in the repository: every clone loads them.
    assert sum(p.stat().st_size for p in (ROOT / "modules").rglob("*") if p.is_file()) <= 15e6
