"""Schemas of tools' parameters where they are read keyword by keyword: shape, and order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pshare_jax.errors import RequestError
from pshare_jax.plain_data import is_list, is_mapping

_LISTS = ("anyOf", "oneOf", "allOf")
_MAPS = ("properties", "$defs", "definitions")


def _is_count(value: Any) -> bool:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not isinstance(value, bool) and value >= 0


def _are_names(value: Any) -> bool:
    return is_list(value) and all(isinstance(name, str) for name in value)


_SHAPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_MAPS, (is_mapping, "an object")),
    **dict.fromkeys((*_LISTS, "enum"), (is_list, "a list")),
    **dict.fromkeys(
        ("minItems", "maxItems", "minLength", "maxLength"), (_is_count, "a whole number, 0 or more")
    ),
    "required": (_are_names, "a list of names"),
    "type": (
        lambda value: isinstance(value, str) or _are_names(value),
        "a type or a list of types",
    ),
}


def check_keywords(schema: Any, where: str) -> None:
    """Checks the keywords that grammars of calls are made of; a keyword that is null is absent.

    Args:
        schema: as the client has written it, of bounded size.
        where: its place in the request.

    Raises:
        RequestError: names the keyword that has not the shape that it must have.
    """
    stack: list[tuple[Any, str]] = [(schema, where)]
    while stack:
        value, at = stack.pop()
        if value is True:
            continue
        if not is_mapping(value):
            raise RequestError(f"{at} must be a schema that something follows", param="tools")
        for keyword, (fits, what) in _SHAPES.items():
            if value.get(keyword) is not None and not fits(value[keyword]):
                raise RequestError(f"{at}.{keyword} must be {what}", param="tools")
        stack += _below(value, at)


def ordered(schema: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The properties that a checked schema requires, and the others, each once."""
    properties: Mapping[str, Any] = schema.get("properties") or {}
    named: list[str] = schema.get("required") or []
    required = [key for key in dict.fromkeys(named) if key in properties]
    known = set(required)
    return required, [key for key in properties if key not in known]


def _below(schema: Mapping[str, Any], where: str) -> Iterator[tuple[Any, str]]:
    for keyword in _MAPS:
        parts: Mapping[str, Any] = schema.get(keyword) or {}
        for name, each in parts.items():
            yield each, f"{where}.{keyword}.{name[:60]}"
    for keyword in _LISTS:
        for number, each in enumerate(schema.get(keyword) or ()):
            yield each, f"{where}.{keyword}[{number}]"
    if schema.get("items") is not None:
        yield schema["items"], f"{where}.items"
