"""Answers that are Python functions, run with unit tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from pshare_jax.errors import DataError
from pshare_jax.evals import sandbox
from pshare_jax.evals.verdict import Grade, shorten

_BLOCK = re.compile(
    r"```(?:python3?|py)[ \t]*\r?\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE | re.I
)
_FIELDS = {"entry_point", "tests", "prompt"}


def check_reference(reference: Any) -> None:
    """Raises DataError unless `reference` has an `entry_point`, `tests` and at most a `prompt`."""
    if not isinstance(reference, dict) or not {"entry_point", "tests"} <= reference.keys():
        raise DataError('reference must be {"entry_point": name, "tests": source}, as kind is code')
    if unknown := sorted(reference.keys() - _FIELDS):
        raise DataError(f"reference: {', '.join(unknown)} is not known; it has {sorted(_FIELDS)}")
    if not all(isinstance(value, str) for value in reference.values()):
        raise DataError("reference: entry_point, tests and prompt must be texts")
    if not reference["entry_point"].isidentifier():
        raise DataError(f"reference: entry_point {shorten(reference['entry_point'])!r} is no name")
    try:
        tree = ast.parse(reference["tests"])
    except (SyntaxError, ValueError, RecursionError) as error:
        raise DataError(f"reference: the tests are no valid Python: {error}") from error
    if not tree.body:
        raise DataError("reference: there are no tests")


def grade(
    reference: Mapping[str, str], text: str, limits: sandbox.Limits = sandbox.DEFAULT_LIMITS
) -> Grade:
    """Runs the answer's code and then its tests.

    Args:
        reference: `entry_point`, the name that must be defined; `tests`, source with assertions,
            or with a function `check(candidate)` as HumanEval's; `prompt`, source that the code
            goes on from.
        text: the answer; of an answer with a fenced block of Python, that block is the code.
        limits: of the process that runs it.

    Raises:
        EvaluationError: no such process can be started.
    """
    source = reference.get("prompt", "") + extract(text)
    try:
        source.encode()
    except UnicodeEncodeError:
        return Grade(False, "the code is not valid Unicode")
    program = sandbox.Program(
        source, reference["tests"], reference["entry_point"], _has_check(reference["tests"])
    )
    outcome = sandbox.run(program, limits)
    return Grade(outcome.passed, outcome.detail)


def extract(text: str) -> str:
    """The first block that is fenced as Python; without one, the whole text."""
    block = _BLOCK.search(text)
    return block[1] if block else text


def _has_check(tests: str) -> bool:
    return any(
        isinstance(node, ast.FunctionDef) and node.name == "check" for node in ast.parse(tests).body
    )
