"""The items of an evaluation, read from JSONL files that the trainer reads too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from pshare_jax.errors import DataError
from pshare_jax.evals import exact, final_number, programs, tools
from pshare_jax.text.tools import in_openai_form

Kind = Literal["exact", "math", "code", "tools"]
_SHOWN = 60


@dataclass(frozen=True)
class Item:
    """A question and what a right answer must be.

    Args:
        id: unique in its file.
        kind: how answers are graded.
        messages: the conversation up to the answer, as OpenAI's API takes it.
        tools: OpenAI's descriptions of functions; empty when there are none.
        reference: what answers are compared with; its shape depends on `kind`.
    """

    id: str
    kind: Kind
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    reference: Any


def read_items(path: str | Path) -> list[Item]:
    """The items of a JSONL file, in its order; empty lines do not count.

    A last message of the assistant is the reference answer and is dropped. Functions in BFCL's
    style (`{"name", "description", "parameters"}`) are wrapped as OpenAI's API wants them.

    Raises:
        DataError: the file cannot be read or has no items, or names file and line of one that
            cannot be used.
    """
    items: list[Item] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(_read(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            item = parse_item(line)
            if item.id in lines:
                raise DataError(f"id {item.id!r} is that of line {lines[item.id]} already")
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        lines[item.id] = number
        items.append(item)
    if not items:
        raise DataError(f"{path}: no items")
    return items


def file_sha256(path: str | Path) -> str:
    """Hash (hex) of the file's bytes.

    Raises:
        DataError: it cannot be read.
    """
    return hashlib.sha256(_read(path)).hexdigest()


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_item(line: bytes | str) -> Item:
    """The item of one line.

    Raises:
        DataError: says what is wrong with the line.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError("not a JSON object")
    if not isinstance(name := record.get("id"), str) or not name:
        raise DataError("id is missing or no text; give each item one of its own")
    if (kind := record.get("kind")) not in get_args(Kind):
        raise DataError(f"kind is {_show(kind)}; it must be one of {', '.join(get_args(Kind))}")
    if "reference" not in record:
        raise DataError("reference is missing: what a right answer is compared with")
    item = Item(name, cast(Kind, kind), _messages(record), _tools(record), record["reference"])
    _check_reference(item)
    return item


def _check_reference(item: Item) -> None:
    match item.kind:
        case "exact":
            exact.check_reference(item.reference)
        case "math":
            final_number.check_reference(item.reference)
        case "code":
            programs.check_reference(item.reference)
        case "tools":
            tools.check_reference(item.reference, item.tools)


def _messages(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = record.get("messages")
    if not isinstance(messages, list):
        raise DataError("messages is missing or no list")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f'messages[{index}] is not {{"role": ..., "content": ...}}')
        calls = message["role"] == "assistant" and message.get("tool_calls")
        if not _is_text(message.get("content")) and not calls:
            raise DataError(f"messages[{index}]: content is missing or no text")
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise DataError("messages holds no question")
    return messages


def _is_text(content: Any) -> bool:
    """Whether `content` is a text, or a list of text parts, which servers join."""
    if isinstance(content, list):
        return bool(content) and all(
            isinstance(part, dict)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
            for part in content
        )
    return isinstance(content, str)


def _tools(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = record.get("tools") or []
    if not isinstance(given, list):
        raise DataError("tools is not a list")
    wrapped: list[dict[str, Any]] = []
    for index, tool in enumerate(map(in_openai_form, given)):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f'tools[{index}] is not {{"type": "function", "function": {{"name": ...}}}}'
            )
        _check_schema(index, function)
        wrapped.append(tool)
    return wrapped


def _check_schema(index: int, function: Mapping[str, Any]) -> None:
    schema = function.get("parameters")
    properties = schema.get("properties") if isinstance(schema, dict) else None
    required = schema.get("required") if isinstance(schema, dict) else None
    usable = (
        isinstance(schema, dict | None)
        and isinstance(properties, dict | None)
        and isinstance(required, list | None)
        and all(isinstance(one, dict) for one in (properties or {}).values())
    )
    if not usable:
        raise DataError(f"tools[{index}]: parameters is no JSON schema of an object")


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
