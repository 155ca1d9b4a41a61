import json

import pytest

from pshare_jax.errors import RequestError
from pshare_jax.text.grammar_spec import (
    GrammarLimits,
    GrammarSpec,
    from_response_format,
    from_structured_outputs,
)

LIMITS = GrammarLimits(max_chars=200, max_depth=5, max_nodes=20, max_choices=3)


def test_response_formats():
    read = from_response_format
    assert read(None, LIMITS) is None
    assert read({"type": "text"}, LIMITS) is None
    assert read({"type": "json_object"}, LIMITS) == GrammarSpec("json_object")
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    given = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    assert read(given, LIMITS) == GrammarSpec("json_schema", json.dumps(schema))


def test_structured_outputs():
    read = from_structured_outputs
    assert read(None, LIMITS) is None
    assert read({"json": None, "regex": None}, LIMITS) is None
    schema = '{"type": "integer"}'
    assert read({"json": schema}, LIMITS) == GrammarSpec("json_schema", schema)
    assert read({"json": json.loads(schema)}, LIMITS) == GrammarSpec("json_schema", schema)
    assert read({"json": True}, LIMITS) == GrammarSpec("json_schema", "{}")
    assert read({"regex": "a+"}, LIMITS) == GrammarSpec("regex", "a+")
    assert read({"choice": ["a", "b"]}, LIMITS) == GrammarSpec("choice", '["a", "b"]')
    assert read({"grammar": "start: A"}, LIMITS) == GrammarSpec("lark", "start: A")
    assert read({"json_object": True}, LIMITS) == GrammarSpec("json_object")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"type": "xml"}, "must be text, json_object or json_schema, got 'xml'"),
        ({"type": "json_schema"}, "schema is missing"),
        ({"type": "json_schema", "json_schema": {"schema": 5}}, "must be an object"),
    ],
)
def test_bad_response_formats(value, message):
    with pytest.raises(RequestError, match=message) as caught:
        from_response_format(value, LIMITS)
    assert str(caught.value.param).startswith("response_format.")


@pytest.mark.parametrize(
    ("value", "param", "message"),
    [
        ({"json": {}, "regex": "a"}, "structured_outputs", "must hold one of"),
        ({"structural_tag": "x"}, "structured_outputs.structural_tag", "not served"),
        ({"json": "{"}, "structured_outputs.json", "is not JSON"),
        ({"json": "[" * 100}, "structured_outputs.json", "is not JSON"),
        ({"json": "[]"}, "structured_outputs.json", "must be an object"),
        ({"json": {"a": {"b": {"c": {"d": {"e": 1}}}}}}, "structured_outputs.json", "5 deep"),
        ({"json": {"enum": [1] * 30}}, "structured_outputs.json", "more than 20 values"),
        ({"json": {"const": "x" * 300}}, "structured_outputs.json", "at most 200 are taken"),
        ({"json": {"x-guidance": {}}}, "structured_outputs.json", "x-guidance"),
        ({"regex": "a" * 201}, "structured_outputs.regex", "has 201 characters"),
        ({"regex": ["a"]}, "structured_outputs.regex", "must be a text"),
        ({"regex": "\ud800"}, "structured_outputs.regex", "not valid Unicode"),
        ({"choice": []}, "structured_outputs.choice", "1 to 3 texts"),
        ({"choice": ["a"] * 4}, "structured_outputs.choice", "1 to 3 texts"),
        ({"choice": ["a", 5]}, "structured_outputs.choice", "a list of texts"),
        ({"choice": [""]}, "structured_outputs.choice", "a list of texts"),
    ],
)
def test_bad_structured_outputs(value, param, message):
    with pytest.raises(RequestError, match=message) as caught:
        from_structured_outputs(value, LIMITS)
    assert caught.value.param == param


def test_a_deep_schema_needs_no_stack():
    schema: dict = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(RequestError, match="nested more than 64 deep"):
        from_structured_outputs({"json": schema}, GrammarLimits())
