"""The command line: reports go where the configuration says, and errors are one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pshare_jax.config_files import load_config
from pshare_jax.study.__main__ import main
from pshare_jax.study.config import SHARES, StudyConfig

ROOT = Path(__file__).parents[2]
TASK = '{"name": "t", "train": 1, "validation": 1, "test": 1, "max_tokens": 1}'


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where a document and the results of a base with all shares are; the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    Path("docs/training.md").write_text("a\n<!-- study: begin -->\nold\n<!-- study: end -->\nb\n")
    names = ("test", *(f"test, share {share}" for share in SHARES))
    evaluations = {name: {"accuracy": 0.5, "correct": "10"} for name in names}
    result = {"task": "t", "method": "base", "examples": 0, "evaluations": evaluations}
    Path("results").mkdir()
    Path("results/t-base.json").write_text(json.dumps(result))
    return tmp_path


def report(*flags: str, results: str = "results") -> int:
    where = ["--base=b", "--folder=f", f"--results={results}"]
    return main(["report", *where, f"--tasks=[{TASK}]", "--runs=[]", *flags])


@pytest.mark.parametrize("absolute", [False, True])
def test_results_may_lie_anywhere(folder, capsys, absolute):
    results = str(folder / "results") if absolute else "results"
    assert report("--document=docs/training.md", results=results) == 0
    text = (folder / "docs/training.md").read_text()
    assert "| base, not trained | - | 1 | - | 50.0 (" in text
    assert "](../results/t-shares.png)\n" in text
    assert (folder / "docs/../results/t-shares.png").is_file()
    assert "old" not in text
    assert capsys.readouterr().out == "docs/training.md: 1 results\n"


def test_the_rest_of_a_document_stays(folder):
    document = folder / "docs/training.md"
    first = document.read_text()
    document.write_text(f"{first}<!-- other: begin -->\nolder\n<!-- other: end -->\nc\n")
    assert report("--document=docs/training.md", "--section=other") == 0
    text = document.read_text()
    assert text.startswith(f"{first}<!-- other: begin -->\n")
    assert text.endswith("\n<!-- other: end -->\nc\n")
    assert "| base, not trained | - | 1 | - | 50.0 (" in text
    assert "older" not in text


def test_a_study_without_a_document_is_printed(folder, capsys):
    before = (folder / "docs/training.md").read_text()
    assert report() == 0
    out = capsys.readouterr().out
    assert "| base, not trained | - | 1 | - | 50.0 (" in out
    assert "](results/t-shares.png)\n" in out
    assert (folder / "docs/training.md").read_text() == before


def test_only_one_study_writes_a_section_of_the_document(folder):
    """`make modules` runs a part of one, which must not take its place."""
    sections = {
        path.name: (config.document, config.section)
        for path in ROOT.glob("configs/study/*.yaml")
        if (config := load_config(StudyConfig, ["--config", str(path)], "study")).document
    }
    assert sections == {
        "smollm2-135m.yaml": ("docs/training.md", "study"),
        "gemma3-270m.yaml": ("docs/training.md", "study-gemma3"),
    }
    before = (folder / "docs/training.md").read_text()
    config = ROOT / "configs/study/modules.yaml"
    assert main(["report", "--config", str(config), "--results=results"]) == 0
    assert (folder / "docs/training.md").read_text() == before


def test_plots_need_an_extra(folder, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report() == 2
    assert capsys.readouterr().err == (
        "pshare_jax.study: the report's plots need matplotlib: pip install 'pshare_jax[study]'\n"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--results=nowhere"], "nowhere: no results; make them with python -m pshare_jax.study"),
        (["--batch_size=0"], "batch_size is 0; it must be at least 1"),
        (["--dtype=auto"], "dtype"),
        (['--runs=[{"task": "u", "method": "full", "examples": 16}]'], "no task 'u' in tasks"),
    ],
)
def test_errors_are_one_line(folder, capsys, flags, message):
    assert report(*flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pshare_jax.study: ")
    assert message in err
    assert err.count("\n") == 1


def test_an_unknown_command(capsys):
    assert main(["walk"]) == 2
    assert capsys.readouterr().err.startswith("usage: ")
