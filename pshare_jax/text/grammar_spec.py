"""What an answer has to look like, as requests say it: checked, but not compiled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pshare_jax.core.constraints import GrammarKind, GrammarSpec
from pshare_jax.errors import RequestError
from pshare_jax.plain_data import is_list, is_mapping
from pshare_jax.text.grammar import GrammarLimits

_STRUCTURED: dict[str, GrammarKind] = {
    "json": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "lark",
}


def from_response_format(
    value: Mapping[str, Any] | None, limits: GrammarLimits, param: str = "response_format"
) -> GrammarSpec | None:
    """What OpenAI's `response_format` asks for; None for plain text.

    Raises:
        RequestError: it is malformed, or larger than `limits`; names the field below `param`.
    """
    if value is None or value.get("type") == "text":
        return None
    match value.get("type"):
        case "json_object":
            return GrammarSpec("json_object")
        case "json_schema":
            given = value.get("json_schema")
            if not isinstance(given, Mapping) or "schema" not in given:
                raise RequestError(
                    f"{param}.json_schema.schema is missing", param=f"{param}.json_schema"
                )
            where = f"{param}.json_schema.schema"
            return GrammarSpec("json_schema", _schema_text(given["schema"], limits, where))
        case kind:
            raise RequestError(
                f"{param}.type must be text, json_object or json_schema, got {str(kind)[:60]!r}",
                param=f"{param}.type",
            )


def from_structured_outputs(
    value: Mapping[str, Any] | None, limits: GrammarLimits, param: str = "structured_outputs"
) -> GrammarSpec | None:
    """What vLLM's `structured_outputs` asks for: one of json, json_object, regex, choice, grammar.

    Raises:
        RequestError: it is malformed, asks for something else, or is larger than `limits`.
    """
    given = {name: item for name, item in (value or {}).items() if item not in (None, False)}
    if not given:
        return None
    for name in given:
        if name not in _STRUCTURED:
            raise RequestError(f"{param}.{name[:60]} is not served", param=f"{param}.{name[:60]}")
    if len(given) > 1:
        raise RequestError(f"{param} must hold one of {', '.join(_STRUCTURED)}", param=param)
    ((name, item),) = given.items()
    kind, where = _STRUCTURED[name], f"{param}.{name}"
    match kind:
        case "json_object":
            return GrammarSpec(kind)
        case "json_schema":
            return GrammarSpec(kind, _schema_text(item, limits, where))
        case "choice":
            return GrammarSpec(kind, _choices_text(item, limits, where))
        case _:
            if not isinstance(item, str) or not item:
                raise RequestError(f"{where} must be a text", param=where)
            return GrammarSpec(kind, bounded(item, limits, where))


def _schema_text(schema: Any, limits: GrammarLimits, where: str) -> str:
    if isinstance(schema, str):
        bounded(schema, limits, where)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where} is not JSON: {error}", param=where) from None
    if isinstance(schema, bool):  # anything, or nothing
        schema = {} if schema else {"enum": []}
    if not is_mapping(schema):
        raise RequestError(f"{where} must be an object", param=where)
    check_schema(schema, limits, where)
    return bounded(json.dumps(schema, ensure_ascii=False), limits, where)


def check_schema(schema: Mapping[str, Any], limits: GrammarLimits, where: str) -> None:
    """Raises RequestError for a schema that is too large. Walks without recursion, which a deep one
    would exhaust."""
    stack: list[tuple[Any, int]] = [(schema, 1)]
    nodes = 0
    while stack:
        value, depth = stack.pop()
        nodes += 1
        if depth > limits.max_depth:
            raise RequestError(f"{where} is nested more than {limits.max_depth} deep", param=where)
        if nodes > limits.max_nodes:
            raise RequestError(f"{where} holds more than {limits.max_nodes} values", param=where)
        if is_mapping(value):
            if "x-guidance" in value:
                raise RequestError(f"{where}: x-guidance is not supported", param=where)
            stack += [(item, depth + 1) for item in value.values()]
        elif is_list(value):
            stack += [(item, depth + 1) for item in value]


def _choices_text(choices: Any, limits: GrammarLimits, where: str) -> str:
    if not is_list(choices) or not all(isinstance(c, str) and c for c in choices):
        raise RequestError(f"{where} must be a list of texts", param=where)
    if not 1 <= len(choices) <= limits.max_choices:
        raise RequestError(f"{where} must hold 1 to {limits.max_choices} texts", param=where)
    return bounded(json.dumps(choices, ensure_ascii=False), limits, where)


def bounded(text: str, limits: GrammarLimits, where: str) -> str:
    """`text`, or RequestError if it is too long, or no Unicode."""
    if len(text) > limits.max_chars:
        raise RequestError(
            f"{where} has {len(text)} characters; at most {limits.max_chars} are taken", param=where
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where} is not valid Unicode: {error.reason}", param=where) from None
    return text
