"""Other libraries as referees of `verify`: transformers and llama.cpp, where they are installed.

Nothing of their reading is shared with ours: files, names, arithmetic, tokens and templates are
theirs. They run in a process of their own, by any interpreter that has them.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pshare_jax.convert import referee_worker
from pshare_jax.convert.files import one_line
from pshare_jax.errors import CheckpointError

SEPARATOR = ":"
MODULES = {
    "transformers": ("torch", "transformers"),
    "llama.cpp": ("llama_cpp (of llama-cpp-python) or llama_cpp_py_sync",),
}
"""What each referee needs to have installed."""


@dataclass(frozen=True)
class Referee:
    """A model as another library reads it.

    Args:
        kind: a key of `MODULES`.
        model: a Hugging Face folder, or a GGUF file for llama.cpp.
        python: the interpreter that has the library.
    """

    kind: str
    model: Path
    python: str = sys.executable


@dataclass(frozen=True)
class Reading:
    """What a referee says.

    Args:
        library: its name and version.
        logits: `[positions, vocab]` float32, of our tokens of all prompts, in order.
        tokens: its own tokens of each prompt.
        rendered: the conversation without and with a tool; None where it does not say.
        end_tokens: what ends a reply; None where it does not say.
    """

    library: str
    logits: np.ndarray
    tokens: list[list[int]]
    rendered: list[str | None] | None
    end_tokens: list[int] | None


def named_referee(text: str, python: str | None) -> Referee | None:
    """What `transformers:FOLDER` or `llama.cpp:FILE` names; None for any other text.

    Raises:
        CheckpointError: there is no such folder or file.
    """
    kind, found, path = text.partition(SEPARATOR)
    if not found or kind not in MODULES:
        return None
    is_there = Path(path).is_dir() if kind == "transformers" else Path(path).is_file()
    if not is_there:
        what = "folder" if kind == "transformers" else "GGUF file"
        raise CheckpointError(f"{path}: no such {what} for {kind} to read")
    return Referee(kind, Path(path), python or sys.executable)


@contextlib.contextmanager
def read(
    referee: Referee,
    prompts: Sequence[str],
    tokens: Sequence[Sequence[int]],
    messages: Sequence[Any],
    tool: Any,
) -> Iterator[Reading]:
    """What the referee says; its logits are in a file that the end of the block removes.

    Args:
        referee: who is asked.
        prompts: texts, of which it gives its own tokens.
        tokens: our tokens, of which it gives the logits; one list a prompt, none empty.
        messages: a conversation that it renders.
        tool: a tool, for the second rendering.

    Raises:
        CheckpointError: the interpreter lacks the library, or the library fails on the model.
    """
    question = {"prompts": prompts, "tokens": tokens, "messages": messages, "tool": tool}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "question.json").write_text(json.dumps(question))
        _run(referee, folder)
        answer = json.loads((Path(folder) / "answer.json").read_text())
        yield Reading(
            answer["library"],
            np.load(Path(folder) / "logits.npy", mmap_mode="r"),
            answer["tokens"],
            answer["rendered"],
            answer["ends"],
        )


def _run(referee: Referee, folder: str) -> None:
    # From standard input: beside the file lie modules of ours whose names other packages have.
    command = [referee.python, "-", referee.kind, str(referee.model.resolve()), folder]
    try:
        run = subprocess.run(
            command,
            input=Path(referee_worker.__file__).read_text(),
            capture_output=True,
            text=True,
            errors="replace",
            cwd=folder,
        )
    except OSError as error:
        raise CheckpointError(f"{referee.python}: cannot be run: {one_line(error)}") from error
    if run.returncode == 0:
        return
    last = next((line for line in reversed(run.stderr.splitlines()) if line.strip()), "no message")
    if last.startswith(("ModuleNotFoundError", "ImportError")):
        raise CheckpointError(
            f"{referee.python}: {last.partition(': ')[2]}; comparing with {referee.kind} needs "
            f"{' and '.join(MODULES[referee.kind])}: --python names an interpreter that has it"
        )
    raise CheckpointError(
        f"{referee.model}: {referee.kind} ended with {run.returncode}: {last.strip()[:400]}"
    )
