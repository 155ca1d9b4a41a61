"""The tool-calling task: questions and answers of the Berkeley Function-Calling Leaderboard.

They come out of the `bfcl-eval` wheel (Apache 2.0), of which only data files are read; its many
dependencies are not needed. Function descriptions are shortened to a signature and a sentence, so
that a small model can learn from the thousand questions there are.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pshare_jax.errors import DataError
from pshare_jax.frontend.tool_prompt import signature

PACKAGE = "bfcl-eval==2026.3.23"
_FILES = ("simple_python", "multiple", "live_simple", "live_multiple")
_MAX_CHARACTERS = 700
_MAX_FUNCTIONS = 4
_SEED = 0


@dataclass(frozen=True)
class ToolCall:
    """A question that one function call answers.

    Args:
        question: the functions' signatures and the question.
        answer: the call in Python's syntax.
        reference: BFCL's acceptable answers.
        functions: descriptions of the functions, BFCL's own.
        source: the id of the question in BFCL.
    """

    question: str
    answer: str
    reference: list[dict[str, Any]]
    functions: list[dict[str, Any]]
    source: str


def load() -> list[ToolCall]:
    """All questions that are short enough and answered by one call, in BFCL's order.

    Raises:
        DataError: the package cannot be had.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
        done = subprocess.run(
            [*command, "--dest", folder], check=False, capture_output=True, text=True
        )
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise DataError(f"{PACKAGE} cannot be downloaded: {done.stderr.strip()[-300:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            calls = [call for name in _FILES for call in _read(wheel, name)]
    seen: set[str] = set()
    return [c for c in calls if not (c.question in seen or seen.add(c.question))]


def _read(wheel: zipfile.ZipFile, name: str) -> Iterator[ToolCall]:
    answers = {
        entry["id"]: entry["ground_truth"]
        for entry in _lines(wheel, f"bfcl_eval/data/possible_answer/BFCL_v4_{name}.json")
    }
    for entry in _lines(wheel, f"bfcl_eval/data/BFCL_v4_{name}.json"):
        turns, reference = entry["question"][0], answers[entry["id"]]
        functions = entry["function"]
        if len(reference) != 1 or len(turns) != 1 or len(functions) > _MAX_FUNCTIONS:
            continue
        signatures = "\n".join(signature(function) for function in functions)
        question = f"{signatures}\n\n{turns[0]['content']}\nAnswer with one function call."
        if len(question) <= _MAX_CHARACTERS:
            answer = _call(reference[0], functions)
            yield ToolCall(question, answer, reference, functions, entry["id"])


def _lines(wheel: zipfile.ZipFile, name: str) -> Iterator[dict[str, Any]]:
    with wheel.open(name) as file:
        for line in file:
            yield json.loads(line)


def _call(
    reference: Mapping[str, Mapping[str, Sequence[Any]]], functions: Sequence[Mapping[str, Any]]
) -> str:
    """A call out of the acceptable answers: the first of each argument, optional ones left out.

    BFCL marks what may be left out by an empty text among the acceptable values, some arguments
    that the function requires too: those are given all the same.
    """
    [(name, arguments)] = reference.items()
    required = {
        key
        for function in functions
        if function["name"] == name
        for key in function["parameters"].get("required", [])
    }
    given = []
    for key, values in arguments.items():
        named = [value for value in values if value != ""]
        if named and (key in required or len(named) == len(values)):
            given.append(f"{key}={_plain(named[0])!r}")
    return f"{name}({', '.join(given)})"


def _plain(value: Any) -> Any:
    """An acceptable value without the alternatives that BFCL lists within dictionaries."""
    if isinstance(value, dict):
        return {
            key: _plain(options[0]) if isinstance(options, list) and options else options
            for key, options in value.items()
            if options != [""]
        }
    if isinstance(value, list):
        return [_plain(element) for element in value]
    return value


def split_by_function(
    calls: Sequence[ToolCall], sizes: Mapping[str, int]
) -> dict[str, list[ToolCall]]:
    """Splits so that no function occurs in two splits; what is left over goes to training.

    Functions that occur together in a question belong together. Whole groups, in random order,
    fill the test set, then the validation set, up to their sizes.

    Args:
        calls: all questions.
        sizes: the most items of each of `train`, `validation` and `test`.
    """
    groups = _groups(calls)
    random.Random(_SEED).shuffle(groups)
    splits: dict[str, list[ToolCall]] = {split: [] for split in sizes}
    for group in groups:
        for split in ("test", "validation", "train"):
            if len(splits[split]) + len(group) <= sizes[split]:
                splits[split] += group
                break
    return splits


def _groups(calls: Sequence[ToolCall]) -> list[list[ToolCall]]:
    """Connected components of questions that share a function, in order of first occurrence."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for call in calls:
        first, *others = (function["name"] for function in call.functions)
        for name in others:
            parent[root(name)] = root(first)
    groups: dict[str, list[ToolCall]] = {}
    for call in calls:
        groups.setdefault(root(call.functions[0]["name"]), []).append(call)
    return list(groups.values())
