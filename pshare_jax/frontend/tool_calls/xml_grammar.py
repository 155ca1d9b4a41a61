"""The grammar of one call as Qwen 3 Coder writes it; `xml_blocks` reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from pshare_jax.errors import RequestError
from pshare_jax.frontend.tool_calls.schemas import ordered
from pshare_jax.frontend.tool_calls.xml_values import is_text, names_text
from pshare_jax.plain_data import is_mapping

_END = "\n</parameter>\n"
_ONLY_JSON = ("pattern", "format")


def xml_call(
    name: str,
    schema: Mapping[str, Any],
    rules: dict[str, str],
    prefix: str,
    json_rule: Callable[[Any], str],
) -> str:
    """`<function=name>`, its parameters (required ones first), and `</function>`.

    Args:
        name: of the function.
        schema: of its parameters.
        rules: where the rules of values are added.
        prefix: of their names.
        json_rule: makes the rule of a value in JSON.

    Raises:
        RequestError: a parameter is held to what bare text cannot be held to.
    """
    required, optional = ordered(schema)
    parts = [_text(f"<function={name}>\n")]
    for number, key in enumerate([*required, *optional]):
        rule = f"{prefix}_p{number}"
        _add_value(rules, f"{rule}_v", schema, key, json_rule)
        rules[rule] = f"{_text(f'<parameter={key}>{chr(10)}')} {rule}_v"
        parts.append(rule if number < len(required) else f"{rule}?")
    return " ".join([*parts, _text("</function>")])


def _add_value(
    rules: dict[str, str],
    rule: str,
    schema: Mapping[str, Any],
    key: str,
    json_rule: Callable[[Any], str],
) -> None:
    """A value and the tag that ends it."""
    given = schema["properties"][key]
    value: Mapping[str, Any] = given if is_mapping(given) else {}
    choices: list[Any] = [value["const"]] if "const" in value else value.get("enum") or []
    if choices:
        texts = [c if isinstance(c, str) else json.dumps(c, ensure_ascii=False) for c in choices]
        rules[rule] = f"({' | '.join(map(_text, texts))}) {_text(_END)}"
    elif is_text(schema, key) or names_text(schema, key):
        wrong = [keyword for keyword in _ONLY_JSON if keyword in value]
        if wrong:
            raise RequestError(
                f"tools: parameter {key!r} is bare text in this model's calls, which cannot be "
                f"held to {wrong[0]!r}; leave it out, or do not force the call",
                param="tools",
            )
        least, most = int(value.get("minLength") or 0), value.get("maxLength")
        bound = "" if most is None else int(most)
        count = "*" if not least and most is None else f"{{{least},{bound}}}"
        # What ends a value is the first of its ends: what is before it cannot hold one.
        rules[f"{rule}[suffix={_text(_END)}]"] = rf"/(.|\n){count}/"
    else:
        definitions = {k: schema[k] for k in ("$defs", "definitions") if k in schema}
        rules[f"{rule}_j"] = json_rule({**value, **definitions} if definitions else value)
        rules[rule] = f"{rule}_j {_text(_END)}"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
