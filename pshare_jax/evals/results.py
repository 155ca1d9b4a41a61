"""Result files: everything that is needed to audit an evaluation, as one JSON object."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pshare_jax.convert.files import replace_file
from pshare_jax.errors import CheckpointError, EvaluationError
from pshare_jax.evals.intervals import bootstrap_interval, wilson_interval


def accuracy(correct: Sequence[bool]) -> dict[str, Any]:
    """A result's `items` and `correct` (numbers of them), `accuracy` and 95 % intervals of it.

    Raises:
        ValueError: there are no answers.
    """
    return {
        "items": len(correct),
        "correct": sum(correct),
        "bootstrap_95": list(bootstrap_interval(correct)),
        "wilson_95": list(wilson_interval(correct)),
        "accuracy": sum(correct) / len(correct),
    }


def check_writable(path: str | Path) -> None:
    """Makes the folder of a result file that does not exist yet.

    Raises:
        EvaluationError: the file exists, or cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise EvaluationError(f"{path}: exists already; remove it or name another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be written: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise EvaluationError(f"{path}: cannot be written: the folder is read-only")


def write_result(path: str | Path, result: Mapping[str, Any]) -> None:
    """Writes a JSON object to a file, whole or not at all.

    Raises:
        EvaluationError: it cannot be written.
    """
    write_file(path, json.dumps(result, indent=2) + "\n")


def write_file(path: str | Path, text: str) -> None:
    """Writes a text so that the file is the whole of it or does not change at all.

    Raises:
        EvaluationError: it cannot be written.
    """
    try:
        replace_file(path, text)
    except CheckpointError as error:
        raise EvaluationError(str(error)) from error


def read_result(path: str | Path) -> dict[str, Any]:
    """A result file's object.

    Raises:
        EvaluationError: it cannot be read, or is no result.
    """
    try:
        result = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise EvaluationError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(result, dict) or not {"data", "model", "answers"} <= result.keys():
        raise EvaluationError(f"{path}: is no result of pshare_jax.evals")
    return result
