"""The command line: results, comparisons, and errors on one line with exit code 2."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pshare_jax.errors import EvaluationError
from pshare_jax.evals.__main__ import main
from pshare_jax.evals.items import file_sha256
from pshare_jax.evals.results import write_file, write_result
from tests.evals.helpers import record, write_lines


def errors_of(capsys, *args: object) -> str:
    assert main([str(arg) for arg in args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pshare_jax.evals: ")
    return line


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "items.jsonl"
    return write_lines(path, [record(f"i{n}", f"the quick {n}") for n in range(6)])


def evaluate(data: Path, output: Path, *origin: str) -> dict:
    flags = [f"--data={data}", f"--output={output}", "--max-tokens=6", *origin]
    assert main(["run", *flags]) == 0
    return json.loads(output.read_text())


def test_run_and_compare(capsys, url, serve_config, data, tmp_path):
    first = evaluate(data, tmp_path / "new/a.json", f"--url={url}", "--model=base")
    assert first["data"] == {"file": str(data), "sha256": file_sha256(data), "items": 6}
    assert (first["model"], first["correct"], first["items"]) == ("base", 0, 6)
    assert first["backend"]["url"] == url
    out = capsys.readouterr()
    assert "0 of 6 right, 0.0% (95 % interval 0.0% to 0.0%)" in out.out
    assert out.err == ""

    # The answers of the first become right for the offline engine.
    right = [
        record(a["id"], f"the quick {n}", reference=a["output"] or "-")
        for n, a in enumerate(first["answers"])
    ]
    right[0]["reference"] = "something else"
    same = write_lines(tmp_path / "same.jsonl", right)
    offline = [f"--config={serve_config}", "--set=decode.max_num_seqs=4"]
    second = evaluate(same, tmp_path / "b.json", *offline, "--model=base")
    outputs = [answer["output"] for answer in first["answers"]]
    assert [answer["output"] for answer in second["answers"]] == outputs
    assert second["correct"] == 5
    third = evaluate(same, tmp_path / "c.json", f"--url={url}", "--model=coder")

    capsys.readouterr()
    args = ["compare", str(tmp_path / "b.json"), str(tmp_path / "c.json")]
    assert main([*args, f"--json={tmp_path / 'bc.json'}"]) == 0
    text = capsys.readouterr().out
    comparison = json.loads((tmp_path / "bc.json").read_text())
    assert comparison["difference"] == pytest.approx(third["accuracy"] - second["accuracy"])
    pairs = [
        (b["correct"], c["correct"])
        for b, c in zip(second["answers"], third["answers"], strict=True)
    ]
    assert comparison["mcnemar"]["only_a"] == pairs.count((True, False)) > 0
    assert comparison["mcnemar"]["only_b"] == pairs.count((False, True))
    assert f"{comparison['difference'] * 100:+.1f} points" in text
    assert f"p = {comparison['mcnemar']['p_value']:.3g}" in text
    # One answer of six is another one.
    altered = json.loads((tmp_path / "b.json").read_text())
    altered["answers"][2]["output"] += "."
    write_result(tmp_path / "altered.json", altered)
    assert main(["compare", str(tmp_path / "b.json"), str(tmp_path / "altered.json")]) == 0
    assert re.search(r"letter by letter\W+5\W", capsys.readouterr().out)
    message = errors_of(capsys, "compare", tmp_path / "new/a.json", tmp_path / "b.json")
    assert "the results are of different data" in message

    limited = evaluate(same, tmp_path / "d.json", f"--url={url}", "--model=base", "--limit=2")
    assert limited["items"] == 2
    message = errors_of(capsys, "compare", tmp_path / "b.json", tmp_path / "d.json")
    assert "4 items are in one result only, such as i2; evaluate both with the same" in message


def test_errors(capsys, url, serve_config, data, tmp_path):
    output = tmp_path / "r.json"
    run = ("run", f"--data={data}", f"--output={output}", "--model=base")
    assert "cannot be reached" in errors_of(capsys, *run, "--url=http://127.0.0.1:1")
    assert "serves no model 'x'" in errors_of(capsys, *run, f"--url={url}", "--model=x")
    assert "KEY is not set" in errors_of(capsys, *run, f"--url={url}", "--api-key-variable=KEY")
    assert "nothing.yaml" in errors_of(capsys, *run, "--config=nothing.yaml")
    message = errors_of(capsys, *run, f"--config={serve_config}", "--set=decode.size=1")
    assert "decode.size" in message
    bad = write_lines(tmp_path / "bad.jsonl", [record("a", "?"), {"id": "b"}])
    assert f"{bad}:2: kind is null" in errors_of(capsys, *run, f"--data={bad}", f"--url={url}")
    output.write_text("old")
    assert "r.json: exists already; remove it" in errors_of(capsys, *run, f"--url={url}")
    assert output.read_text() == "old"
    folder = errors_of(capsys, *run, f"--output={output}/x.json", f"--url={url}")
    assert "cannot be written: File exists" in folder
    assert "not valid JSON" in errors_of(capsys, "compare", output, output)
    write_result(tmp_path / "s.json", {"answers": 3})
    assert "is no result of" in errors_of(capsys, "compare", tmp_path / "s.json", output)
    assert "cannot be read" in errors_of(capsys, "compare", tmp_path / "none", output)


def test_usage(capsys):
    for args in (["run"], ["run", "--limit=0"], ["assess"]):
        with pytest.raises(SystemExit) as error:
            main(args)
        assert error.value.code == 2
    assert re.search(r"invalid choice: .assess", capsys.readouterr().err)


def test_import(capsys, tmp_path):
    problem = {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n",
        "entry_point": "one",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }
    source = write_lines(tmp_path / "problems.jsonl", [problem])
    assert main(["import", "human-eval", str(source), str(tmp_path / "items.jsonl")]) == 0
    (line,) = (tmp_path / "items.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "HumanEval/0"
    assert "1 items in" in capsys.readouterr().out
    write_lines(source, [{"task_id": "x"}])
    message = errors_of(capsys, "import", "human-eval", source, tmp_path / "other.jsonl")
    assert "problems.jsonl:1: is no such problem: KeyError: 'prompt'" in message
    assert not (tmp_path / "other.jsonl").exists()


def test_a_result_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    write_result(path, {"a": "é\ud800"})
    assert json.loads(path.read_text()) == {"a": "é\ud800"}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(EvaluationError, match=r"r\.json: cannot be written: No space left"):
        write_file(path, "new")
    assert json.loads(path.read_text()) == {"a": "é\ud800"}
    assert list(tmp_path.iterdir()) == [path]


def test_grading_needs_no_jax():
    """Other packages grade answers in processes of their own."""
    source = (
        "import sys, pshare_jax.evals.grading, pshare_jax.evals.intervals, "
        "pshare_jax.evals.results, pshare_jax.evals.__main__\n"
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", source], check=True, timeout=60)
