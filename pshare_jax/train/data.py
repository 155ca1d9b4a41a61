"""From JSONL lines to token ids and the turns that are trained."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pshare_jax.core.split_rule import SplitRule
from pshare_jax.errors import DataError, RequestError
from pshare_jax.frontend.chat import TemplateOptions
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.train.config import BadLine
from pshare_jax.train.conversation import (
    Conversation,
    LineError,
    Part,
    Turn,
    Turns,
    ended,
    given_weight,
    is_blank,
)

__all__ = ["Dataset", "Example", "LineReader", "Turn", "files_sha256", "read_dataset"]

_SHOWN_BAD_LINES = 5
_KNOWN = {"messages", "tools", "prompt", "completion", "weight", "train", "loss"}
# What the files of evaluations have besides, see `evals/items.py`.
_KNOWN |= {"id", "kind", "reference", "answer_cut"}
CUT = "answer_cut"
"""Field of a line whose last answer came to no end: a teacher was stopped at its most tokens."""
_FORMS = (
    '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]} or '
    '{"prompt": ..., "completion": ...}'
)


@dataclass(frozen=True)
class Example:
    """A sequence and the answers in it.

    Each turn's prompt, as the server would get it, is exactly the tokens before the turn.

    Args:
        tokens: `[n]` int32; nothing follows the last turn.
        turns: in order; each starts at 1 or later. None at all: a prompt that a teacher is to
            answer.
        source: `file:line`.
        dropped: what of the line is not in the tokens, such as `messages[].name of user`.
    """

    tokens: np.ndarray
    turns: tuple[Turn, ...]
    source: str
    dropped: tuple[str, ...] = ()


@dataclass
class Dataset:
    """The examples of some files.

    Args:
        examples: in file order. A conversation is several when its chat template writes an earlier
            turn differently once others follow it.
        sha256: hash (hex) of the files' bytes.
        bad_lines: `file:line: reason` of the first lines that were skipped.
        num_bad_lines: how many were skipped.
        bad_kinds: how many of each kind, such as `empty answer`.
    """

    examples: list[Example] = field(default_factory=list)
    sha256: str = ""
    bad_lines: list[str] = field(default_factory=list)
    num_bad_lines: int = 0
    bad_kinds: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class LineReader:
    """How a line becomes examples.

    Args:
        tokenizer: the base's.
        max_length: most tokens of an example.
        positions: most tokens that base and teacher have positions for; None is no bound.
        rule: the split rule: by it each prompt must invoke the decode module. Where it does not,
            the base answers, and there is nothing to train.
        unanswered: whether a line may lack its last answer; it then gives one example without
            turns.
        turns: whether all answers of a conversation are trained or the last one only.
        options: how the server renders chats.
        complete: what is done to a line (a JSON object) before it is read, if anything: a teacher
            elsewhere adds its answer, or None where that is empty: the line is left out.
    """

    tokenizer: Tokenizer
    max_length: int
    positions: int | None = None
    rule: SplitRule | None = None
    unanswered: bool = False
    turns: Turns = "all"
    options: TemplateOptions = TemplateOptions()  # noqa: RUF009 - immutable
    complete: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None

    def read(self, line: bytes, source: str) -> list[Example]:
        """The examples of one line: mostly one.

        Raises:
            LineError: starts with `source`; says what is wrong with the line and what to do.
        """
        try:
            record: dict[str, Any] | None = parse_line(line)
            if self.complete is not None:
                record = self.complete(record)
            if record is None:
                return []
            parts, dropped = self._parts(record)
            for part in parts:
                self._check(part)
        except RequestError as error:
            named = f"{error.param}: " if error.param and error.param not in str(error) else ""
            raise LineError(f"{source}: {named}{error}") from error
        except LineError as error:
            raise LineError(f"{source}: {error}", error.kind) from error
        return [
            Example(np.asarray(part.tokens, np.int32), tuple(part.turns), source, dropped)
            for part in parts
        ]

    def _parts(self, record: Mapping[str, Any]) -> tuple[list[Part], tuple[str, ...]]:
        """Sequences of a line, and what of it they do not show."""
        weight = given_weight(record, "")
        if weight == 0:
            raise LineError("its weight is 0, so there is nothing to train", "weight 0")
        dropped = [name for name in record if name not in _KNOWN and record[name] is not None]
        if "messages" in record:
            chat = Conversation(record, self.tokenizer, self.options)
            if self.unanswered and chat.asks:
                parts = [Part(chat.question(), [])]
            else:
                parts = chat.parts(self.turns, cut=bool(record.get(CUT)))
            dropped += chat.dropped
        elif self.unanswered and "completion" not in record:
            parts = [Part(self._prompt(record), [])]
        else:
            parts = [self._completion(record)]
        if weight is not None:
            parts = [
                Part(p.tokens, [replace(t, weight=t.weight * weight) for t in p.turns])
                for p in parts
            ]
        return parts, tuple(dropped)

    def _prompt(self, record: Mapping[str, Any]) -> list[int]:
        if not isinstance(text := record.get("prompt"), str):
            raise LineError(_not_understood(record, "prompt"), "unknown format")
        if not (prompt := self.tokenizer.encode(text)):
            raise LineError("the prompt has no tokens", "no prompt")
        return prompt

    def _completion(self, record: Mapping[str, Any]) -> Part:
        prompt = self._prompt(record)
        if not isinstance(text := record.get("completion"), str):
            raise LineError(_not_understood(record, "completion"), "unknown format")
        answer = self.tokenizer.encode(text, add_special_tokens=False)
        answer = ended(answer, self.tokenizer, bool(record.get(CUT)))
        if is_blank(answer, self.tokenizer):
            raise LineError(
                "completion is empty or blank, so that its end alone would be trained; leave the "
                "line out",
                "empty answer",
            )
        return Part(prompt + answer, [Turn(len(prompt), len(prompt) + len(answer))])

    def _check(self, part: Part) -> None:
        tokens, turns = part.tokens, part.turns
        prompts = [tokens[: turn.start] for turn in turns] or [tokens]
        rule = self.rule
        if rule is not None and not all(rule.split(prompt).invoked for prompt in prompts):
            raise LineError(
                f"a prompt does not hold the invocation {rule.to_json()}, without which "
                "the base answers; add it, or leave such lines out with data.on_bad_line=skip",
                "no invocation",
            )
        # The answer to come needs at least one token.
        length = len(tokens) + (not turns)
        if self.positions is not None and length > self.positions:
            raise LineError(
                f"{length} tokens, but the base has {self.positions} positions, so that it could "
                "not be served; shorten it, or leave such lines out with data.on_bad_line=skip",
                "too long",
            )
        if length > self.max_length:
            raise LineError(
                f"{length} tokens, but data.max_length is {self.max_length}; raise it, "
                "or leave such lines out with data.on_bad_line=skip",
                "too long",
            )


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        LineError: it is none.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LineError(f"not valid JSON: {error}", "not JSON") from error
    if not isinstance(record, dict):
        raise LineError("not a JSON object", "not JSON")
    return record


def lacks_answer(record: Mapping[str, Any]) -> bool:
    """Whether a line is a question alone, which a teacher is to answer."""
    messages = record.get("messages")
    if messages is None:
        return "prompt" in record and "completion" not in record
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") != "assistant"


def _not_understood(record: Mapping[str, Any], name: str) -> str:
    """What is wrong with a line whose `name` is no text."""
    for keys, kind in (
        ({"conversations"}, "ShareGPT's format"),
        ({"conversation"}, "ShareGPT's format"),
        ({"instruction", "output"}, "Alpaca's format"),
        ({"chosen", "rejected"}, "preference data"),
        ({"text"}, "plain text"),
    ):
        if keys <= record.keys():
            return f"this is {kind}, which is not read; write {_FORMS}"
    if isinstance(record.get(name), list):
        return f"{name} is a list; write all messages into one: {_FORMS}"
    found = ", ".join(sorted(map(str, record))) or "none"
    return (
        f"needs messages, or prompt and completion; {name} is no text (fields: {found}); "
        f"write {_FORMS}"
    )


def read_dataset(paths: Sequence[str], reader: LineReader, on_bad_line: BadLine) -> Dataset:
    """Reads and tokenises JSONL files; empty lines do not count.

    Args:
        paths: the files.
        reader: reads a line.
        on_bad_line: whether a line that cannot be used is an error or is skipped and counted.

    Raises:
        DataError: a file that cannot be read, names file and line of one that cannot be used, or
            no line could be used.
    """
    dataset = Dataset()
    digest = hashlib.sha256()
    for path in paths:
        for number, line in read_lines(path, digest):
            try:
                dataset.examples += reader.read(line, f"{path}:{number}")
            except LineError as error:
                if on_bad_line == "error":
                    raise
                dataset.num_bad_lines += 1
                dataset.bad_kinds[error.kind] += 1
                if len(dataset.bad_lines) < _SHOWN_BAD_LINES:
                    dataset.bad_lines.append(str(error))
    dataset.sha256 = digest.hexdigest()
    if not dataset.examples:
        hint = f"; the first bad line is {dataset.bad_lines[0]}" if dataset.bad_lines else ""
        raise DataError(f"{', '.join(paths)}: no examples{hint}")
    return dataset


def files_sha256(paths: Sequence[str]) -> str:
    """What `Dataset.sha256` is of these files.

    Raises:
        DataError: one of them cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        for _ in read_lines(path, digest):
            pass
    return digest.hexdigest()


def read_lines(path: str, digest: Any) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line that is not empty; `digest` gets all of them.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
