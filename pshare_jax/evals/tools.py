"""Tool calls, compared with acceptable ones as the Berkeley Function-Calling Leaderboard does.

An acceptable call is `{"name": {"argument": [acceptable values]}}`; an argument that may be left
out has "" among its values. Calls may come in any order.

Source: BFCL's AST evaluation, https://gorilla.cs.berkeley.edu/leaderboard.html
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pshare_jax.errors import DataError
from pshare_jax.evals.verdict import Grade, shorten
from pshare_jax.frontend.tool_calls.syntax import Call, CallSyntaxError, parse_calls

# BFCL's names of types, and JSON schema's.
_TYPES: dict[str, type] = {
    "string": str,
    "any": str,
    "integer": int,
    "float": float,
    "number": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "object": dict,
}
_IGNORED_CHARACTERS = re.compile(r"[ ,./\-_*^]")

Function = Mapping[str, Any]


def check_reference(reference: Any, tools: Sequence[Mapping[str, Any]]) -> None:
    """Raises DataError unless `reference` is a list of acceptable calls to functions of `tools`."""
    if not isinstance(reference, list) or not reference:
        raise DataError(
            'reference must be a list of calls, like [{"f": {"x": [1]}}], as kind is tools'
        )
    known = {tool["function"]["name"] for tool in tools}
    for entry in reference:
        if not isinstance(entry, dict) or len(entry) != 1:
            raise DataError("reference: each entry must be an object with one function's name")
        ((name, arguments),) = entry.items()
        if name not in known:
            raise DataError(f"reference: {name!r} is not among tools, which have {sorted(known)}")
        if not isinstance(arguments, dict) or not all(
            isinstance(values, list) for values in arguments.values()
        ):
            raise DataError(f"reference: {name}: each argument needs a list of acceptable values")


def grade(
    reference: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], text: str
) -> Grade:
    """Whether `text` makes the calls of `reference`, each of them once, and no others.

    Args:
        reference: acceptable calls.
        tools: OpenAI's descriptions of the functions.
        text: see `parse_calls`.
    """
    try:
        calls = parse_calls(text)
    except CallSyntaxError as error:
        return Grade(False, shorten(str(error)))
    if len(calls) != len(reference):
        return Grade(False, f"{len(calls)} calls instead of {len(reference)}")
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    for entry in reference:
        ((name, acceptable),) = entry.items()
        problems = [_problem(call, functions[name], acceptable) for call in calls]
        if None not in problems:
            return Grade(False, shorten(str(problems[0])))
        del calls[problems.index(None)]
    return Grade(True, "calls match")


def _problem(call: Call, function: Function, acceptable: Mapping[str, Sequence[Any]]) -> str | None:
    """What is wrong with `call`; None when it is acceptable."""
    name = function["name"]
    # OpenAI's API has no dots in names.
    if call.name not in (name, name.replace(".", "_")):
        return f"{call.name} is called instead of {name}"
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties") or {}
    for argument in parameters.get("required") or ():
        if argument not in call.arguments:
            return f"argument {argument} is missing"
    for argument, value in call.arguments.items():
        if argument not in properties or argument not in acceptable:
            return f"argument {argument} is not expected"
        if not _acceptable(value, properties[argument], acceptable[argument]):
            return f"{argument} is {value!r}, not one of {list(acceptable[argument])!r}"
    for argument, values in acceptable.items():
        if argument not in call.arguments and "" not in values:
            return f"argument {argument} is missing"
    return None


def _acceptable(value: Any, schema: Mapping[str, Any], values: Sequence[Any]) -> bool:
    declared = schema.get("type")
    if declared == "tuple" and isinstance(value, tuple):
        value = list(value)
    if declared in ("float", "number") and type(value) is int:
        value = float(value)
    if not _has_type(value, declared, values):
        return False
    if isinstance(value, list):
        items = schema.get("items")
        inner = items.get("type") if isinstance(items, Mapping) else None
        return any(
            isinstance(other, list)
            and all(_has_type(element, inner, other) for element in value)
            and _equal(value, other)
            for other in values
        )
    return any(_equal(value, other) for other in values)


def _has_type(value: Any, declared: Any, values: Sequence[Any]) -> bool:
    """Whether `value` is of the declared type, or of that of the first acceptable value.

    The latter may differ: a text that names a variable stands for a value of any type.
    """
    if not isinstance(declared, str) or declared not in _TYPES:
        return True
    given = next((type(other) for other in values if other != ""), None)
    return type(value) in (_TYPES[declared], given)


def _equal(value: Any, other: Any) -> bool:
    """Equality to one acceptable value; members of a dict have acceptable values of their own."""
    match value, other:
        case str(), str():
            return _standardise(value) == _standardise(other)
        case dict(), dict():
            return all(key in other for key in value) and all(
                any(_equal(value[key], one) for one in _as_list(members))
                if key in value
                else "" in _as_list(members)
                for key, members in other.items()
            )
        case list() | tuple(), list():
            return len(value) == len(other) and all(map(_equal, value, other))
        case _:
            # True == 1, but a flag is no number.
            return isinstance(value, bool) == isinstance(other, bool) and value == other


def _as_list(members: Any) -> list[Any]:
    return members if isinstance(members, list) else [members]


def _standardise(text: str) -> str:
    """BFCL's: lower case, without spaces and `,./-_*^`, one kind of quotes."""
    return _IGNORED_CHARACTERS.sub("", text).lower().replace("'", '"')
