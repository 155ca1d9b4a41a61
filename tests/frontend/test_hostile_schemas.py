"""Schemas of tools that are none, or that grow: a refusal that names the keyword, and no more."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pshare_jax.errors import RequestError
from pshare_jax.frontend.tool_calls.grammars import calls_grammar
from pshare_jax.text.grammar import GrammarLimits

STYLES = ["pythonic", "qwen3_coder"]


def grammar(style: str, parameters: dict) -> str:
    functions = [{"name": "f", "parameters": parameters}]
    limits = GrammarLimits()
    return calls_grammar(
        style, functions, one_call=False, token_id=lambda _: None, limits=limits
    ).source


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"properties": ["a"]}, "parameters.properties must be an object"),
        ({"properties": {"a": 5}}, "properties.a must be a schema"),
        ({"properties": {"a": False}}, "properties.a must be a schema"),
        ({"properties": {"a": {}}, "required": 5}, "parameters.required must be a list of names"),
        ({"properties": {"a": {}}, "required": [["a"]]}, "required must be a list of names"),
        ({"properties": {"a": {"enum": 5}}}, "properties.a.enum must be a list"),
        ({"properties": {"a": {"anyOf": 5}}}, "properties.a.anyOf must be a list"),
        ({"properties": {"a": {"anyOf": [{"oneOf": [3]}]}}}, r"anyOf\[0\].oneOf\[0\] must be"),
        ({"properties": {"a": {"type": "array", "minItems": "x"}}}, "minItems must be a whole"),
        ({"properties": {"a": {"type": "array", "maxItems": -1}}}, "maxItems must be a whole"),
        ({"properties": {"a": {"type": "string", "minLength": []}}}, "minLength must be a whole"),
        ({"properties": {"a": {"items": "x"}}}, "items must be a schema"),
        ({"properties": {"a": {"type": ["string", {}]}}}, "a.type must be a type or a list of"),
    ],
    ids=str,
)
def test_a_keyword_of_another_shape_is_named(style: str, parameters: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        grammar(style, parameters)


@pytest.mark.parametrize("style", STYLES)
def test_null_is_absent_and_true_is_anything(style: str) -> None:
    nulls = dict.fromkeys(["enum", "anyOf", "minItems", "maxItems", "minLength", "items"])
    parameters = {"properties": {"a": True, "b": nulls}, "required": None}
    assert grammar(style, parameters)
    twice = {"properties": {"a": {}, "b": {}}, "required": ["b", "b"]}
    once = {"properties": {"a": {}, "b": {}}, "required": ["b"]}
    assert grammar(style, twice) == grammar(style, once)


@pytest.mark.parametrize("style", STYLES)
def test_the_grammar_of_many_parameters_grows_as_they_do(style: str) -> None:
    """Any of them may be left out: a request of a megabyte must not become one of gigabytes."""
    few, many = (
        len(grammar(style, {"properties": {f"p{n}": {"type": "integer"} for n in range(count)}}))
        for count in (200, 2000)
    )
    assert many < 12 * few


def test_a_type_that_is_repeated_is_written_once() -> None:
    def nested(depth: int, kinds: list[str]) -> dict:
        inner = nested(depth - 1, kinds) if depth else {}
        return {"type": kinds, "properties": {"a": inner}, "required": ["a"]}

    once, often = (nested(20, ["object"] * count) for count in (1, 3))
    assert grammar("pythonic", {"properties": {"x": often}}) == grammar(
        "pythonic", {"properties": {"x": once}}
    )


values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.sampled_from(["a", "string"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["a", "type", "properties", "required", "enum", "const", "anyOf", "allOf", "items",
             "minItems", "maxItems", "maxLength", "pattern", "$ref", "$defs"]
        ), inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@pytest.mark.parametrize("style", [*STYLES, "hermes"])
@settings(max_examples=300, deadline=None, derandomize=True)
@given(parameters=st.dictionaries(st.sampled_from(["properties", "required", "type"]), values))
def test_any_schema_gives_a_grammar_or_a_refusal(style: str, parameters: dict) -> None:
    with contextlib.suppress(RequestError):
        assert grammar(style, parameters)
