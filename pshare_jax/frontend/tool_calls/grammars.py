"""Grammars of answers that are tool calls, in the form in which a model writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pshare_jax.core.constraints import GrammarSpec
from pshare_jax.errors import RequestError
from pshare_jax.frontend.tool_calls.schemas import check_keywords, ordered
from pshare_jax.frontend.tool_calls.xml_grammar import xml_call
from pshare_jax.plain_data import is_list, is_mapping
from pshare_jax.text.grammar import JSON_OPTIONS, GrammarLimits
from pshare_jax.text.grammar_spec import bounded, check_schema

Rules = dict[str, str]
"""Rules of a grammar in llguidance's dialect of Lark, by their names."""

_SCALARS = ("string", "integer", "number")
_MAX_REPEATS = 1000
_BY_KEYWORDS = ("pythonic", "qwen3_coder")
"""Styles whose values are no JSON, so that schemas are read here."""


def calls_grammar(
    style: str,
    functions: Sequence[Mapping[str, Any]],
    *,
    one_call: bool,
    token_id: Callable[[str], int | None],
    limits: GrammarLimits,
    answer: GrammarSpec | None = None,
) -> GrammarSpec:
    """The grammar of an answer that calls at least one of `functions`.

    Args:
        style: a parser's name for how calls are written: hermes, llama3_json, mistral, pythonic,
            qwen3_coder.
        functions: name and JSON schema of the `parameters` of each.
        one_call: whether there may be no more than one call.
        token_id: of a token that is spelled out, None if there is no such token.
        limits: how much of a schema is taken.
        answer: JSON that may be answered instead of calling anything.

    Raises:
        RequestError: parameters that cannot be written so; names the tool.
    """
    rules: Rules = {}
    for number, function in enumerate(functions):
        where = f"tools[{number}].function.parameters"
        schema = _parameters(function, limits, where)
        name = f"f{number}"
        if style in _BY_KEYWORDS:
            check_keywords(schema, where)
        if style == "pythonic":
            rules[name] = _python_call(function["name"], schema, rules, name)
        elif style == "qwen3_coder":
            rules[name] = xml_call(function["name"], schema, rules, name, _json)
        else:
            rules[f"{name}_arguments"] = _json(schema)
            key = "parameters" if style == "llama3_json" else "arguments"
            opening = f'{{"name": {json.dumps(function["name"])}, "{key}": '
            rules[name] = f'{_text(opening)} {name}_arguments "}}"'
    rules["call"] = " | ".join(f"f{number}" for number in range(len(functions)))
    start = _several(style, one_call, token_id)
    if answer is not None:
        rules["answer"] = "%json " + (
            _with_options({"type": "object"} if not answer.source else json.loads(answer.source))
        )
        rules["calls"] = start
        start = "calls | answer"
    lines = [f"start: {start}", *(f"{name}: {rule}" for name, rule in rules.items())]
    return GrammarSpec("lark", "\n".join(lines))


def _several(style: str, one_call: bool, token_id: Callable[[str], int | None]) -> str:
    """How calls follow each other."""
    match style:
        case "hermes" | "qwen3_coder":
            one = f"{_text('<tool_call>' + chr(10))} call {_text(chr(10) + '</tool_call>')}"
            return one if one_call else f"{one} ({_text(chr(10))} {one})*"
        case "llama3_json":
            # The family's templates ask for a single one.
            return "call"
        case "mistral":
            opening = token_id("[TOOL_CALLS]")
            tag = _text("[TOOL_CALLS]") if opening is None else f"<[{opening}]>"
            return f'{tag} "[" call "]"' if one_call else f'{tag} "[" call (", " call)* "]"'
        case "pythonic":
            return 'call | "[" call "]"' if one_call else 'call | "[" call (", " call)* "]"'
        case _:
            raise RequestError(
                f"calls in the format {style!r} cannot be forced; only those of hermes, "
                "llama3_json, mistral, pythonic and qwen3_coder can",
                param="tool_choice",
            )


def _parameters(function: Mapping[str, Any], limits: GrammarLimits, where: str) -> dict[str, Any]:
    """The schema of a call's arguments; what it does not name is not written."""
    schema: dict[str, Any] = dict(
        function.get("parameters") or {"type": "object", "properties": {}}
    )
    check_schema(schema, limits, where)
    bounded(json.dumps(schema, ensure_ascii=False), limits, where)
    closed = ("additionalProperties", "patternProperties", "anyOf", "oneOf", "allOf", "$ref")
    if not any(name in schema for name in closed):
        schema["additionalProperties"] = False
    return {"type": "object", **schema}


def _json(schema: Any) -> str:
    return f"%json {_with_options(schema)}"


def _with_options(schema: Any) -> str:
    return json.dumps({"x-guidance": JSON_OPTIONS, **schema}, ensure_ascii=False)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _python_call(name: str, schema: Mapping[str, Any], rules: Rules, prefix: str) -> str:
    """`name(a=1, b="x")`: required arguments first, then others, each in the schema's order."""
    required, optional = ordered(schema)
    names = [f"{prefix}_a{number}" for number in range(len(required) + len(optional))]
    for rule, key in zip(names, [*required, *optional], strict=True):
        value = _python_value(schema["properties"][key], rules, f"{rule}_v")
        rules[rule] = f"{_text(key + '=')} {value}"
    return f'{_text(name + "(")} {_listed(names, len(required), rules, prefix)} ")"'


def _listed(names: Sequence[str], required: int, rules: Rules, prefix: str) -> str:
    """The first `required` of `names` and any of the others, in this order, with commas."""
    if not names:
        return '""'
    if required:
        rest = " ".join(f'(", " {name})?' for name in names[required:])
        return '", " '.join(f"{name} " for name in names[:required]) + rest
    # What may follow each of them is a rule of its own: written out it would be their square.
    first: list[str] = []
    following = ""
    for number, name in reversed(list(enumerate(names))):
        first.append(f"{name} {following}")
        if number:
            rules[f"{prefix}_r{number}"] = f'(", " {name})? {following}'
            following = f"{prefix}_r{number}"
    return f"({' | '.join(reversed(first))})?"


def _python_value(given: Any, rules: Rules, prefix: str) -> str:
    """A Python literal whose value follows a schema, as far as that is told by its keywords here.

    Raises:
        RequestError: the schema uses what only JSON can be held to.
    """
    schema: Mapping[str, Any] = given if is_mapping(given) else {}
    choices = schema.get("enum") or ([schema["const"]] if "const" in schema else None)
    if choices is not None:
        return "(" + " | ".join(_text(repr(choice)) for choice in choices) + ")"
    if is_list(schema.get("type")):
        # Each kind once: each repetition would double what is below.
        kinds = dict.fromkeys(schema["type"])
        schema = {"anyOf": [{**schema, "type": kind} for kind in kinds]}
    if alternatives := schema.get("anyOf") or schema.get("oneOf"):
        values = [
            _python_value(each, rules, f"{prefix}_o{number}")
            for number, each in enumerate(alternatives)
        ]
        return f"({' | '.join(values)})"
    match schema.get("type"):
        case "boolean":
            return '("True" | "False")'
        case "null":
            return '"None"'
        case kind if kind in _SCALARS:
            rules[prefix] = _json(schema)
            return prefix
        case "array":
            return _python_list(schema, rules, prefix)
        case "object" if schema.get("properties"):
            return _python_dict(schema, rules, prefix)
        case None if "$ref" not in schema and "allOf" not in schema:
            return _any_literal(rules)
        case "object" if not schema.get("patternProperties"):
            return _any_dict(rules)
        case _:
            raise RequestError(
                "tools: calls in Python's syntax cannot be held to $ref, allOf or "
                "patternProperties; write the schema out",
                param="tools",
            )


def _python_list(schema: Mapping[str, Any], rules: Rules, prefix: str) -> str:
    item = f"{prefix}_i"
    rules[item] = _python_value(schema.get("items", {}), rules, f"{item}_v")
    least, most = int(schema.get("minItems") or 0), schema.get("maxItems")
    if most == 0:
        return '"[]"'
    bound = "" if most is None else str(min(int(most), _MAX_REPEATS) - 1)
    some = f'"[" {item} (", " {item}){{{max(least - 1, 0)},{bound}}} "]"'
    return some if least else f'({some} | "[]")'


def _python_dict(schema: Mapping[str, Any], rules: Rules, prefix: str) -> str:
    required, optional = ordered(schema)
    names = [f"{prefix}_k{number}" for number in range(len(required) + len(optional))]
    for rule, key in zip(names, [*required, *optional], strict=True):
        value = _python_value(schema["properties"][key], rules, f"{rule}_v")
        rules[rule] = f"{_text(repr(key) + ': ')} {value}"
    return f'"{{" {_listed(names, len(required), rules, prefix)} "}}"'


def _any_literal(rules: Rules) -> str:
    if "py_any" not in rules:
        rules["py_any"] = 'py_scalar | py_list | py_dict | "True" | "False" | "None"'
        rules["py_scalar"] = _json({"type": ["string", "number"]})
        rules["py_list"] = '"[" (py_any (", " py_any)*)? "]"'
        rules["py_key"] = _json({"type": "string"})
        rules["py_dict"] = '"{" (py_key ": " py_any (", " py_key ": " py_any)*)? "}"'
    return "py_any"


def _any_dict(rules: Rules) -> str:
    _any_literal(rules)
    return "py_dict"
