"""From JSONL lines to token ids and the turns that are trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pshare_jax.core.split_rule import SplitRule
from pshare_jax.errors import DataError, RequestError
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.text.tools import in_openai_form
from pshare_jax.train.config import BadLine

_SHOWN_BAD_LINES = 5


@dataclass(frozen=True)
class Turn:
    """An answer: tokens `start .. end - 1` of its example, the end token included."""

    start: int
    end: int


@dataclass(frozen=True)
class Example:
    """A sequence and the answers in it.

    Each turn's prompt, as the server would get it, is exactly the tokens before the turn.

    Args:
        tokens: `[n]` int32; nothing follows the last turn.
        turns: in order; each starts at 1 or later. None at all: a prompt that a teacher is to
            answer.
        source: `file:line`.
    """

    tokens: np.ndarray
    turns: tuple[Turn, ...]
    source: str


@dataclass
class Dataset:
    """The examples of some files.

    Args:
        examples: in file order. A conversation is several when its chat template writes an earlier
            turn differently once others follow it.
        sha256: hash (hex) of the files' bytes.
        bad_lines: `file:line: reason` of the first lines that were skipped.
        num_bad_lines: how many were skipped.
    """

    examples: list[Example] = field(default_factory=list)
    sha256: str = ""
    bad_lines: list[str] = field(default_factory=list)
    num_bad_lines: int = 0


def read_dataset(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    on_bad_line: BadLine,
    unanswered: bool = False,
    rule: SplitRule | None = None,
) -> Dataset:
    """Reads and tokenises JSONL files; empty lines do not count.

    Args:
        paths: the files.
        tokenizer: the base's.
        max_length: most tokens of an example.
        on_bad_line: whether a line that cannot be used is an error or is skipped and counted.
        unanswered: whether a line may lack its last answer, see `read_line`.
        rule: the split rule, see `read_line`.

    Raises:
        DataError: a file that cannot be read, names file and line of one that cannot be used, or
            no line could be used.
    """
    dataset = Dataset()
    digest = hashlib.sha256()
    for path in paths:
        for number, line in _lines(path, digest):
            source = f"{path}:{number}"
            try:
                dataset.examples += read_line(
                    line, tokenizer, max_length, source, unanswered=unanswered, rule=rule
                )
            except DataError as error:
                if on_bad_line == "error":
                    raise
                dataset.num_bad_lines += 1
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
        for _ in _lines(path, digest):
            pass
    return digest.hexdigest()


def _lines(path: str, digest: Any) -> Iterator[tuple[int, bytes]]:
    try:
        with Path(path).expanduser().open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def answered(dataset: Dataset, answers: Sequence[Sequence[int]]) -> Dataset:
    """`dataset` with `answers` (token ids) to its examples that have no turns, in order."""
    remaining = iter(answers)
    examples = []
    for example in dataset.examples:
        if not example.turns:
            answer = np.asarray(next(remaining), np.int32)
            start = len(example.tokens)
            tokens = np.concatenate([example.tokens, answer])
            example = Example(tokens, (Turn(start, len(tokens)),), example.source)
        examples.append(example)
    return replace(dataset, examples=examples)


def read_line(
    line: bytes,
    tokenizer: Tokenizer,
    max_length: int,
    source: str,
    *,
    unanswered: bool = False,
    rule: SplitRule | None = None,
) -> list[Example]:
    """The examples of one line: mostly one.

    With `unanswered`, a prompt without a completion, or messages that do not end with the
    assistant's, give one example without turns. By `rule` each prompt must invoke the decode
    module: where it does not, the base answers, and there is nothing to train.

    Raises:
        DataError: starts with `source`; says what is wrong with the line and what to do.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: not valid JSON: {error}") from error
    try:
        if not isinstance(record, dict):
            raise DataError("not a JSON object")
        if unanswered and _lacks_answer(record):
            parts = [(_question(record, tokenizer), [])]
            # The answer needs at least one token.
            max_length -= 1
        elif "messages" in record:
            parts = _conversation(record, tokenizer)
        else:
            parts = [_completion(record, tokenizer)]
    except (DataError, RequestError) as error:
        raise DataError(f"{source}: {error}") from error
    for tokens, turns in parts:
        prompts = [tokens[: turn.start] for turn in turns] or [tokens]
        if rule is not None and not all(rule.split(prompt).invoked for prompt in prompts):
            raise DataError(
                f"{source}: a prompt does not hold the invocation {rule.to_json()}, without which "
                "the base answers; add it, or leave such lines out with data.on_bad_line=skip"
            )
        if len(tokens) > max_length:
            raise DataError(
                f"{source}: {len(tokens)} tokens, but data.max_length is {max_length}; raise it, "
                "or leave such lines out with data.on_bad_line=skip"
            )
    return [Example(np.asarray(tokens, np.int32), tuple(turns), source) for tokens, turns in parts]


_Parts = tuple[list[int], list[Turn]]


def _lacks_answer(record: Mapping[str, Any]) -> bool:
    messages = record.get("messages")
    if messages is None:
        return "completion" not in record
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") != "assistant"


def _question(record: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """The prompt that the server would get."""
    if "messages" in record:
        messages, tools = _messages(record)
        text = tokenizer.apply_chat_template(messages, tools)
        prompt = tokenizer.encode(text, add_special_tokens=False)
    else:
        if not isinstance(text := record.get("prompt"), str):
            raise DataError("needs messages or prompt; prompt is no text")
        prompt = tokenizer.encode(text)
    if not prompt:
        raise DataError("the prompt has no tokens")
    return prompt


def _completion(record: Mapping[str, Any], tokenizer: Tokenizer) -> _Parts:
    texts: list[str] = []
    for name in ("prompt", "completion"):
        if not isinstance(text := record.get(name), str):
            raise DataError(f"needs messages, or prompt and completion; {name} is no text")
        texts.append(text)
    prompt = tokenizer.encode(texts[0])
    if not prompt:
        raise DataError("the prompt has no tokens")
    answer = _ended(tokenizer.encode(texts[1], add_special_tokens=False), tokenizer)
    return prompt + answer, [Turn(len(prompt), len(prompt) + len(answer))]


def _messages(record: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """The messages and tools of a conversation."""
    messages, tools = record["messages"], record.get("tools")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError("messages is not a list of objects")
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise DataError("tools is not a list of objects")
    return (
        [_message(message, index) for index, message in enumerate(messages)],
        tools and [in_openai_form(tool) for tool in tools],
    )


def _conversation(record: Mapping[str, Any], tokenizer: Tokenizer) -> list[_Parts]:
    """One sequence, or more where a turn's prompt does not begin with the turns before it."""
    messages, tools = _messages(record)
    parts: list[_Parts] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:index], tools)
        after = tokenizer.apply_chat_template(
            messages[: index + 1], tools, add_generation_prompt=False
        )
        if not after.startswith(before):
            raise DataError(
                f"messages[{index}]: the chat template does not write the answer after the prompt "
                "that it asks the answer with, so there is no prompt to train on"
            )
        # Prompt and answer are tokenised apart, as in serving.
        prompt = tokenizer.encode(before, add_special_tokens=False)
        answer = tokenizer.encode(after[len(before) :], add_special_tokens=False)
        answer = _ended(answer, tokenizer)
        if not prompt:
            raise DataError(f"messages[{index}]: the prompt has no tokens")
        turn = Turn(len(prompt), len(prompt) + len(answer))
        if parts and prompt[: len(parts[-1][0])] == parts[-1][0]:
            parts[-1] = (prompt + answer, [*parts[-1][1], turn])
        else:
            parts.append((prompt + answer, [turn]))
    if not parts:
        raise DataError("messages has no assistant turn, so there is nothing to train")
    return parts


def _ended(answer: list[int], tokenizer: Tokenizer) -> list[int]:
    """`answer` up to its last end token; with one, when it has none."""
    ends = [i for i, token in enumerate(answer) if token in tokenizer.eos_token_ids]
    if ends:
        return answer[: ends[-1] + 1]
    if not tokenizer.eos_token_ids:
        raise DataError("the base's tokenizer names no end token, which an answer must end with")
    return [*answer, tokenizer.eos_token_ids[0]]


def _message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message as the server hands it to the chat template."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise DataError(f"messages[{index}]: role is missing or no text")
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise DataError(f"messages[{index}]: content is missing or no text")
    fields = {**message, "role": "system" if role == "developer" else role, "content": content}
    if calls := fields.pop("tool_calls", None):
        try:
            fields["tool_calls"] = [_tool_call(call) for call in calls]
        except (TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"messages[{index}]: tool_calls is not a list of "
                '{"type": "function", "function": {"name": ..., "arguments": ...}}'
            ) from error
    return fields


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    # Templates write the arguments as JSON themselves.
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            decoded = json.loads(arguments)
            arguments = decoded if isinstance(decoded, dict) else arguments
        except ValueError:
            pass  # a model may have produced broken JSON: it is shown as it was
    return {**call, "function": {**function, "arguments": arguments or {}}}
