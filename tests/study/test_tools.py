"""BFCL's questions as examples: calls out of acceptable answers, and splits by function."""

from __future__ import annotations

import json
import zipfile

import pytest

from pshare_jax.errors import DataError
from pshare_jax.study import tasks, tools
from pshare_jax.study.tools import ToolCall

AREA = {
    "name": "area",
    "description": "Area of a shape. Long story.",
    "parameters": {
        "type": "dict",
        "required": ["sides"],
        "properties": {"sides": {"type": "array"}, "unit": {"type": "string"}},
    },
}


def wheel_of(path, questions, answers):
    with zipfile.ZipFile(path, "w") as wheel:
        for name in tools._FILES:
            mine = name == "multiple"
            for folder, records in (("", questions), ("possible_answer/", answers)):
                text = "".join(json.dumps(r) + "\n" for r in records) if mine else ""
                wheel.writestr(f"bfcl_eval/data/{folder}BFCL_v4_{name}.json", text)


def test_a_question_becomes_signatures_and_a_call(tmp_path):
    questions = [
        {"id": "q0", "question": [[{"role": "user", "content": "3 by 4?"}]], "function": [AREA]},
        {"id": "q1", "question": [[{"role": "user", "content": "x" * 900}]], "function": [AREA]},
    ]
    acceptable = {"sides": ["", [3, 4]], "unit": ["", "m"], "name": [{"first": ["Al", "Bo"]}]}
    answers = [{"id": q["id"], "ground_truth": [{"area": acceptable}]} for q in questions]
    wheel_of(tmp_path / "w.whl", questions, answers)
    with zipfile.ZipFile(tmp_path / "w.whl") as wheel:
        calls = list(tools._read(wheel, "multiple"))
    # The second question is too long.
    [call] = calls
    assert call.question == (
        "area(sides: array, unit: string = ...): Area of a shape.\n\n3 by 4?\n"
        "Answer with one function call."
    )
    assert call.answer == "area(sides=[3, 4], name={'first': 'Al'})"
    assert call.reference == [{"area": acceptable}]


def call(index: int, *names: str) -> ToolCall:
    return ToolCall(f"q{index}", "", [], [{"name": name} for name in names], f"id{index}")


def test_no_function_is_in_two_splits_even_through_a_third():
    chains = [
        call(0, "a", "b"),
        call(1, "b", "c"),
        call(2, "c"),
        *(call(i, f"f{i}") for i in range(3, 20)),
    ]
    splits = tools.split_by_function(chains, {"train": 100, "validation": 3, "test": 5})
    names = {s: {f["name"] for c in calls for f in c.functions} for s, calls in splits.items()}
    assert [len(splits[s]) for s in ("train", "validation", "test")] == [12, 3, 5]
    assert not names["train"] & names["test"]
    assert not names["train"] & names["validation"]
    assert not names["validation"] & names["test"]
    assert sum({"a", "b", "c"} <= found for found in names.values()) == 1


def test_overlap_counts_questions_and_functions():
    items = {
        "train": [{"key": "x", "tools": [{"name": "f"}]}, {"key": "y"}],
        "test": [{"key": "y"}, {"key": "z", "tools": [{"name": "f"}]}],
    }
    assert tasks.overlap(items) == 2


def test_generated_splits_share_no_program(tmp_path):
    summary = tasks.make_task("code", (40, 10, 20), tmp_path)
    assert [summary[split]["items"] for split in tasks.SPLITS] == [40, 10, 20]
    assert summary["overlap"] == 0
    sources = {
        split: {
            json.loads(line)["messages"][1]["content"]
            for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()
        }
        for split in tasks.SPLITS
    }
    assert not sources["train"] & sources["test"]
    assert len(sources["train"]) == 40
    assert tasks.make_task("code", (40, 10, 20), tmp_path) == summary


def test_more_items_than_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.programs, "generate", lambda seed, size: iter(()))
    with pytest.raises(DataError, match="code: 2 different test items are more than it can make"):
        tasks.make_task("code", (2, 2, 2), tmp_path / "data")
    assert not (tmp_path / "data").exists()
