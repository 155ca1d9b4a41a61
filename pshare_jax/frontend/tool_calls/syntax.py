"""From a whole text to the function calls in it, in any of the usual forms. Nothing is executed."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pshare_jax.plain_data import is_list, is_mapping, is_object

_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_FENCED = re.compile(r"```[\w+-]*[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL)
_SEPARATOR = re.compile(r"[\s,;]*")
_MAX_CHARACTERS = 100_000


@dataclass(frozen=True)
class Call:
    """A function call; `arguments` are JSON values, besides tuples that Python syntax can hold."""

    name: str
    arguments: dict[str, Any]


class CallSyntaxError(ValueError):
    """A text that is no function call; says why."""


def parse_calls(text: str) -> list[Call]:
    """The calls of an answer that holds nothing else, but for tags or a fence around them.

    Understands JSON, `{"name": "f", "arguments": {"a": 1}}`, one or a list or one a line, inside
    `<tool_call>` tags or a fence or bare, and Python, `f(a=1)` or `[f(a=1), g(b="x")]`.

    Raises:
        CallSyntaxError: it is none of these.
    """
    if len(text) > _MAX_CHARACTERS:
        raise CallSyntaxError("the answer is too long for a call")
    parts = _TAGGED.findall(text) or _FENCED.findall(text)[:1] or [text]
    calls: list[Call] = []
    for part in parts:
        calls += _parse_part(part.strip())
    return calls


def _parse_part(text: str) -> list[Call]:
    if not text:
        raise CallSyntaxError("no call in the answer")
    try:
        if text[0] in "{[" and (values := _json_values(text)) is not None:
            return [_json_call(value) for value in values]
        return python_calls(text)
    except (RecursionError, MemoryError) as error:
        raise CallSyntaxError("the answer is nested too deeply") from error


def _json_values(text: str) -> list[Any] | None:
    """The objects of a JSON text, a list of them flattened; None when it is not JSON."""
    decoder = json.JSONDecoder()
    values: list[Any] = []
    position = 0
    while position < len(text):
        try:
            value, position = decoder.raw_decode(text, position)
        except ValueError:
            return None
        values += value if is_list(value) else [value]
        position = _between(text, position)
    return values


def _between(text: str, position: int) -> int:
    match = _SEPARATOR.match(text, position)
    assert match is not None
    return match.end()


def _json_call(value: Any) -> Call:
    if is_object(value) and is_object(value.get("function")):
        value = value["function"]
    if not is_object(value) or not isinstance(name := value.get("name"), str):
        raise CallSyntaxError('JSON, but not {"name": ..., "arguments": {...}}')
    arguments: Any = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise CallSyntaxError(f"the arguments of {name} are not valid JSON") from error
    if not is_object(arguments):
        raise CallSyntaxError(f"the arguments of {name} are no JSON object")
    return Call(name, arguments)


def python_calls(text: str) -> list[Call]:
    """The calls of `f(a=1)` or `[f(a=1), g(b="x")]`.

    Raises:
        CallSyntaxError: it is no such text, or a call has arguments without names.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escape sequences in the model's text
            tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise CallSyntaxError("neither JSON nor a Python call") from error
    nodes = tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree]
    return [_python_call(node) for node in nodes]


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call):
        raise CallSyntaxError(f"{_source(node)} is not a call")
    name = _source(node.func)
    if node.args:
        raise CallSyntaxError(f"{name} is called with arguments that have no names")
    return Call(name, dict(_keywords(name, node)))


def _keywords(name: str, node: ast.Call) -> Iterator[tuple[str, Any]]:
    for keyword in node.keywords:
        if keyword.arg is None:
            raise CallSyntaxError(f"{name} is called with **, whose values are not known")
        yield keyword.arg, _python_value(keyword.value)


def _python_value(node: ast.expr) -> Any:
    """A literal's value; anything else, such as a variable, as its source text."""
    match node:
        case ast.Constant(value=value) if isinstance(value, str | int | float | None):
            return value
        case ast.List(elts=elements):
            return [_python_value(element) for element in elements]
        case ast.Tuple(elts=elements):
            return tuple(_python_value(element) for element in elements)
        case ast.Dict(keys=keys, values=values) if None not in keys:
            named = zip(keys, values, strict=True)
            return {_key(key): _python_value(value) for key, value in named if key is not None}
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = _python_value(operand)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return -value if isinstance(sign, ast.USub) else value
        case ast.BinOp(left=left, op=op, right=right):
            return _arithmetic(node, _python_value(left), op, _python_value(right))
        case _:
            pass
    return _source(node)


def _key(node: ast.expr) -> Any:
    value = _python_value(node)
    return value if isinstance(value, str | int | float | None) else _source(node)


def _arithmetic(node: ast.expr, left: Any, op: ast.operator, right: Any) -> Any:
    """`3 * 12` and the like of two numbers; the source text when it is anything else."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (left, right))
    if numbers and max(abs(left), abs(right)) < 1e15:
        match op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div() if right:
                return left / right
            case _:
                pass
    return _source(node)


def _source(node: ast.expr) -> str:
    return ast.unparse(node)


def tool_calls_text(tool_calls: Any) -> str:
    """OpenAI's `tool_calls` of an answer as the JSON text that `parse_calls` reads."""
    calls: list[dict[str, Any]] = []
    for call in tool_calls:
        function = call.get("function") if is_mapping(call) else None
        if not is_mapping(function):
            continue
        arguments: Any = function.get("arguments") or {}
        if isinstance(arguments, str):
            # A model may have produced broken JSON: it is graded as it was.
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments)
        calls.append({"name": function.get("name"), "arguments": arguments})
    return json.dumps(calls, ensure_ascii=False)
