"""Bare text as the JSON value that a function's schema says it is."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from pshare_jax.plain_data import is_list, is_mapping

_NOTHING = ("null", "none")
_TRUTHS = {"true": "true", "false": "false"}


def is_text(schema: Mapping[str, Any], key: str) -> bool:
    """Whether parameter `key` is a text and nothing else; one of which nothing is said is one.

    Args:
        schema: of the function's parameters.
        key: the parameter's name.
    """
    return _types(schema, key) <= {"string"}


def names_text(schema: Mapping[str, Any], key: str) -> bool:
    """Whether parameter `key` may be a text, beside something else."""
    return "string" in _types(schema, key)


def value_json(text: str, schema: Mapping[str, Any], key: str) -> str:
    """The JSON text of a parameter's value; a JSON string if it is nothing that it should be.

    Args:
        text: as the model has written it.
        schema: of the function's parameters.
        key: the parameter's name.
    """
    kinds, bare = _types(schema, key), text.strip()
    if "null" in kinds and bare.lower() in _NOTHING:
        return "null"
    if "boolean" in kinds and bare.lower() in _TRUTHS:
        return _TRUTHS[bare.lower()]
    value = _literal(bare)
    if isinstance(value, float) and value.is_integer() and not kinds & {"number"}:
        value = int(value)
    kind = _kind(value)
    if kind in kinds or (kind == "integer" and "number" in kinds):
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False)


def _kind(value: Any) -> str:
    match value:
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case dict():
            return "object"
        case list():
            return "array"
        case _:
            return ""


def _literal(text: str) -> Any:
    """The value of JSON, or of a literal in Python's syntax; None of anything else."""
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
            # What JSON cannot hold is refused, infinite numbers among it.
            return json.loads(json.dumps(value, allow_nan=False))
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _types(schema: Mapping[str, Any], key: str) -> frozenset[str]:
    properties = schema.get("properties")
    found = properties.get(key) if is_mapping(properties) else None
    return frozenset(_types_of(found, schema, set()))


def _types_of(schema: Any, root: Mapping[str, Any], seen: set[str]) -> set[str]:
    """The types that a schema names, by its own keywords and those that it refers to.

    Each reference is followed once: a schema of a few lines can refer to itself in any number of
    ways. `seen` are those that have been.
    """
    if not is_mapping(schema):
        return set()
    kinds: set[str] = set()
    named = schema.get("type")
    if isinstance(named, str):
        kinds.add(named)
    elif is_list(named):
        kinds.update(kind for kind in named if isinstance(kind, str))
    constants = _list(schema, "enum") + ([schema["const"]] if "const" in schema else [])
    if not kinds and constants:
        kinds.update(
            "null" if c is None else "string" if isinstance(c, str) else _kind(c) for c in constants
        )
    for keyword in ("anyOf", "oneOf", "allOf"):
        for each in _list(schema, keyword):
            kinds |= _types_of(each, root, seen)
    target = schema.get("$ref")
    if isinstance(target, str) and target not in seen and target.startswith("#/"):
        seen.add(target)
        kinds |= _types_of(_at(root, target), root, seen)
    return kinds


def _list(schema: Mapping[str, Any], keyword: str) -> list[Any]:
    # Schemas of tools that need not be called are not checked.
    value = schema.get(keyword)
    return value if is_list(value) else []


def _at(root: Mapping[str, Any], pointer: str) -> Any:
    value: Any = root
    for part in pointer[2:].split("/"):
        part = part.replace("~1", "/").replace("~0", "~")
        value = value.get(part) if is_mapping(value) else None
    return value
