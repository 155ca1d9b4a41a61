"""Files of items, and benchmarks as such files."""

from __future__ import annotations

import gzip
import hashlib
import json

import pytest

from pshare_jax.errors import DataError
from pshare_jax.evals import benchmarks
from pshare_jax.evals.grading import grade
from pshare_jax.evals.items import file_sha256, parse_item, read_items
from tests.evals.helpers import FUNCTION, item, record, write_lines


def test_a_file(tmp_path):
    answer = {"role": "assistant", "content": "yes"}
    lines = [
        record("a", "well?"),
        record("b", "how many?", kind="math", reference="3", note="further keys are ignored"),
        {**record("c", "?"), "messages": [{"role": "user", "content": "?"}, answer]},
    ]
    path = write_lines(tmp_path / "items.jsonl", lines)
    path.write_text(path.read_text().replace("\n", "\n\n"))
    items = read_items(path)
    assert [(one.id, one.kind, one.reference) for one in items] == [
        ("a", "exact", "yes"),
        ("b", "math", "3"),
        ("c", "exact", "yes"),
    ]
    assert items[2].messages == [{"role": "user", "content": "?"}]
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_only_the_last_answer_is_dropped():
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    assert item(messages=messages).messages == messages[:-1]
    assert item(messages=messages[:-1]).messages == messages[:-1]


def test_text_parts_are_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}]
    assert item(messages=messages).messages == messages
    for wrong in ([], [{"type": "image_url"}], [{"type": "text"}]):
        with pytest.raises(DataError, match=r"messages\[0\]: content is missing or no text"):
            item(messages=[{"role": "user", "content": wrong}])


def test_tools_become_openais():
    wrapped = {"type": "function", "function": FUNCTION}
    fields = {"kind": "tools", "reference": [{"weather": {"city": ["Oslo"]}}]}
    for tools in ([FUNCTION], [wrapped]):
        one = item(tools=tools, **fields)
        assert one.tools == [wrapped]
        assert grade(one, 'weather(city="oslo")').correct
    assert item().tools == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not a JSON object"),
        (record("", "?"), "id is missing"),
        (record("a", "?", id=3), "id is missing"),
        (record("a", "?", kind="essay"), 'kind is "essay"; it must be one of exact, math, code'),
        (record("a", "?", kind=["x" * 100]), r"kind is \[\"xxx.*\.\.\.; it must"),
        ({key: value for key, value in record("a", "?").items() if key != "reference"}, "missing"),
        (record("a", "?", messages="hi"), "messages is missing or no list"),
        (record("a", "?", messages=["hi"]), r"messages\[0\] is not"),
        (record("a", "?", messages=[{"role": "user"}]), r"messages\[0\]: content is missing"),
        (record("a", "?", messages=[]), "messages holds no question"),
        (
            record("a", "?", messages=[{"role": "assistant", "content": "x"}]),
            "messages holds no question",
        ),
        (record("a", "?", tools={"a": 1}), "tools is not a list"),
        (record("a", "?", tools=[{"type": "function"}]), r"tools\[0\] is not"),
        (record("a", "?", tools=[{"name": "f", "parameters": []}]), "no JSON schema"),
        (
            record("a", "?", tools=[{"name": "f", "parameters": {"properties": {"x": 1}}}]),
            "no JSON schema",
        ),
        (record("a", "?", reference=3), "reference must be a text"),
        (record("a", "?", kind="math", reference="many"), "holds no number"),
        (record("a", "?", kind="code", reference="x"), "reference must be"),
        (record("a", "?", kind="tools", reference=[{"f": {}}]), "'f' is not among tools"),
    ],
)
def test_bad_lines(line, message):
    text = line if isinstance(line, str) else json.dumps(line)
    with pytest.raises(DataError, match=message):
        parse_item(text)


def test_errors_name_file_and_line(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(record("a", "?")) + "\n\nno\n")
    with pytest.raises(DataError, match=rf"{path}:3: not valid JSON"):
        read_items(path)
    write_lines(path, [record("a", "?"), record("b", "?"), record("a", "?")])
    with pytest.raises(DataError, match=rf"{path}:3: id 'a' is that of line 1 already"):
        read_items(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="no items"):
        read_items(path)
    for function in (read_items, file_sha256):
        with pytest.raises(DataError, match="cannot be read: No such file"):
            function(tmp_path / "nothing.jsonl")


def test_grading_goes_by_kind():
    assert grade(item(), "Yes!").correct
    assert grade(item(kind="math", reference="4"), "so 4").correct
    reference = {"entry_point": "f", "tests": "assert f() == 1"}
    assert grade(item(kind="code", reference=reference), "def f(): return 1").correct


def test_human_eval(tmp_path):
    problem = {
        "task_id": "HumanEval/0",
        "prompt": 'def one():\n    """One."""\n',
        "entry_point": "one",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(problem).encode()))
    (line,) = benchmarks.human_eval(path)
    one = parse_item(json.dumps(line))
    assert one.id == "HumanEval/0"
    assert '```python\ndef one():\n    """One."""\n```' in one.messages[0]["content"]
    assert grade(one, problem["canonical_solution"]).correct
    assert not grade(one, "    return 2").correct
    path.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot be read"):
        benchmarks.human_eval(path)


def test_bfcl(tmp_path):
    question = {
        "id": "simple_0",
        "question": [[{"role": "user", "content": "How is it in Oslo?"}]],
        "function": [FUNCTION],
    }
    answer = {"id": "simple_0", "ground_truth": [{"weather": {"city": ["Oslo"]}}]}
    questions = write_lines(tmp_path / "questions.json", [question])
    answers = write_lines(tmp_path / "answers.json", [answer])
    (line,) = benchmarks.bfcl(questions, answers)
    one = parse_item(json.dumps(line))
    assert one.messages == question["question"][0]
    assert grade(one, "weather(city='OSLO')").correct
    write_lines(questions, [{**question, "id": "simple_1"}])
    with pytest.raises(DataError, match=r"questions.json:1: is no such problem: KeyError"):
        benchmarks.bfcl(questions, answers)
    write_lines(questions, [{**question, "question": question["question"] * 2}])
    with pytest.raises(DataError, match=r"questions.json:1: is no such problem"):
        benchmarks.bfcl(questions, answers)
