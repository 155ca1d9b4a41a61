"""Published benchmarks as items: HumanEval, and the Berkeley Function-Calling Leaderboard."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pshare_jax.errors import DataError
from pshare_jax.evals.items import parse_item

_CODE_REQUEST = (
    "Complete this Python function. Answer with the whole function in one fenced block of Python."
)


def human_eval(path: str | Path) -> list[dict[str, Any]]:
    """The problems of `HumanEval.jsonl.gz` (or unpacked) as records of a file of items.

    Source: Chen et al., Evaluating Large Language Models Trained on Code (arXiv 2107.03374)

    Raises:
        DataError: the file cannot be read, or names file and line of what is no problem.
    """
    return [_record(source, problem, _human_eval_item) for source, problem in _read(path)]


def bfcl(questions: str | Path, answers: str | Path) -> list[dict[str, Any]]:
    """Single-turn Python questions of BFCL as records of a file of items.

    Args:
        questions: such as `BFCL_v4_simple_python.json`.
        answers: the file of that name in `possible_answer`.

    Raises:
        DataError: a file cannot be read, or names file and line of what is no question or has no
            answer.
    """
    known = {answer.get("id"): answer for _, answer in _read(answers)}
    return [
        _record(source, question, lambda one: _bfcl_item(one, known[one["id"]]))
        for source, question in _read(questions)
    ]


def _human_eval_item(problem: Mapping[str, Any]) -> dict[str, Any]:
    prompt = problem["prompt"]
    return {
        "id": problem["task_id"],
        "kind": "code",
        "messages": [
            {"role": "user", "content": f"{_CODE_REQUEST}\n\n```python\n{prompt.strip()}\n```"}
        ],
        "reference": {
            "prompt": prompt,
            "entry_point": problem["entry_point"],
            "tests": problem["test"],
        },
    }


def _bfcl_item(question: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
    (turn,) = question["question"]
    return {
        "id": question["id"],
        "kind": "tools",
        "messages": turn,
        "tools": [{"type": "function", "function": function} for function in question["function"]],
        "reference": answer["ground_truth"],
    }


def _record(
    source: str, line: dict[str, Any], make: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    try:
        record = make(line)
        parse_item(json.dumps(record))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{source}: is no such problem: {type(error).__name__}: {error}") from error
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    return record


def _read(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """`file:line` and object of each line."""
    path = Path(path)
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    records: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not valid JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: not a JSON object")
        records.append((f"{path}:{number}", record))
    return records
