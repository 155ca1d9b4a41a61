"""Kind tools: calls read from text, and compared as BFCL does."""

import contextlib
import json
import keyword

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pshare_jax.errors import DataError
from pshare_jax.evals.tools import check_reference, grade
from pshare_jax.frontend.tool_calls.syntax import (
    Call,
    CallSyntaxError,
    parse_calls,
    tool_calls_text,
)

WEATHER = Call("weather", {"city": "Oslo", "days": 3})
JSON = '{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}'


@pytest.mark.parametrize(
    "text",
    [
        JSON,
        f"[{JSON}]",
        f"```json\n{JSON}\n```",
        f"Sure:\n```\n{JSON}\n```\nDone.",
        f"<tool_call>\n{JSON}\n</tool_call>",
        f"I will look.<tool_call>{JSON}",
        '{"name": "weather", "parameters": {"city": "Oslo", "days": 3}}',
        '{"type": "function", "function": {"name": "weather", "arguments": '
        '"{\\"city\\": \\"Oslo\\", \\"days\\": 3}"}}',
        'weather(city="Oslo", days=3)',
        '[weather(city="Oslo", days=3)]',
        "```python\nweather(city='Oslo', days=3)\n```",
        "weather(city='Oslo', days=1 + 2)",
    ],
)
def test_one_call(text):
    assert parse_calls(text) == [WEATHER]


@pytest.mark.parametrize(
    "text",
    [
        f"[{JSON}, {JSON}]",
        f"{JSON}\n{JSON}",
        f"<tool_call>{JSON}</tool_call>\n<tool_call>{JSON}</tool_call>",
        "[weather(city='Oslo', days=3), weather(city='Oslo', days=3)]",
        "weather(city='Oslo', days=3), weather(city='Oslo', days=3)",
    ],
)
def test_two_calls(text):
    assert parse_calls(text) == [WEATHER, WEATHER]


def test_python_values():
    (call,) = parse_calls(
        "a.b(x=-1.5, y=[True, None], z={'k': (1, 2)}, v=other.thing, w=f(1), u=-v, s='\\d', "
        "t=2*'a')"
    )
    assert call == Call(
        "a.b",
        {
            "x": -1.5,
            "y": [True, None],
            "z": {"k": (1, 2)},
            "v": "other.thing",
            "w": "f(1)",
            "u": "-v",
            "s": "\\d",
            "t": "2 * 'a'",
        },
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no call"),
        ("I do not know.", "neither JSON nor a Python call"),
        ("weather('Oslo')", "arguments that have no names"),
        ("weather(**x)", "whose values are not known"),
        ("3", "3 is not a call"),
        ('{"city": "Oslo"}', 'but not {"name"'),
        ('{"name": "weather", "arguments": [1]}', "no JSON object"),
        ('{"name": "weather", "arguments": "{"}', "not valid JSON"),
        ("weather(city=9**9**9**9); 1", "neither"),
        ("[" * 100_000, "neither|nested"),
        ("(" * 5_000, "neither|nested"),
        ("f(x=" + "-" * 50_000 + "1)", "nested"),
        ("x" * 200_000, "too long"),
        ("\x00", "neither"),
    ],
)
def test_no_call(text, reason):
    with pytest.raises(CallSyntaxError, match=reason):
        parse_calls(text)


def test_large_powers_are_not_computed():
    assert parse_calls("f(x=9**9**9**9)") == [Call("f", {"x": "9 ** 9 ** 9 ** 9"})]


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True).filter(
    lambda name: not keyword.iskeyword(name)
)


@given(_NAMES, st.dictionaries(_NAMES, _VALUES, max_size=3))
def test_both_syntaxes_give_the_call_back(name, arguments):
    call = Call(name, arguments)
    source = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    assert parse_calls(f"{name}({source})") == [call]
    assert parse_calls(json.dumps({"name": name, "arguments": arguments})) == [call]


@given(st.text("fx(=)[]{}\"':,1 \n`<tool_call>/\\"))
def test_any_text_is_calls_or_an_error(text):
    with contextlib.suppress(CallSyntaxError):
        assert all(isinstance(call, Call) for call in parse_calls(text))


def test_servers_tool_calls_are_a_text():
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}]
    assert tool_calls_text(calls) == '[{"name": "f", "arguments": {"x": "é"}}]'
    broken = [{"function": {"name": "f", "arguments": "{"}}]
    with pytest.raises(CallSyntaxError, match="not valid JSON"):
        parse_calls(tool_calls_text(broken))


def tool(name: str = "f", required: tuple[str, ...] = ("x",), **types: object) -> dict:
    properties = {
        key: value if isinstance(value, dict) else {"type": value} for key, value in types.items()
    }
    parameters = {"type": "dict", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def verdict(schema: object, acceptable: list, value: object) -> bool:
    """Whether `f(x=value)` is right."""
    call = {"name": "f", "arguments": {"x": value}}
    return grade([{"f": {"x": acceptable}}], [tool(x=schema)], json.dumps(call)).correct


@pytest.mark.parametrize(
    ("schema", "acceptable", "value", "expected"),
    [
        ("integer", [5], 5, True),
        ("integer", [5, 6], 6, True),
        ("integer", [5], 4, False),
        ("integer", [1], True, False),
        ("integer", [5], 5.0, False),
        ("integer", [5], "5", False),
        ("integer", ["width"], "width", True),
        ("float", [5.0], 5, True),
        ("number", [5.0], 5, True),
        ("float", [0.5], "0.5", False),
        ("boolean", [True], True, True),
        ("boolean", [True], 1, False),
        ("boolean", [True], "true", False),
        ("string", ["April 1, 2024"], "april 1 2024", True),
        ("string", ["San Francisco, CA"], "san-francisco/ca", True),
        ("string", ["it's"], 'IT"S', True),
        ("string", ["New York"], "New Jersey", False),
        ("string", ["5"], 5, False),
        ("array", [[1, 2]], [1, 2], True),
        ("array", [[1, 2]], [2, 1], False),
        ("array", [[1, 2], [2, 1]], [2, 1], True),
        ("array", [[1, 2]], [1], False),
        ("array", [["Paris", "Rome"]], ["paris", "ROME"], True),
        ({"type": "array", "items": {"type": "integer"}}, [[1]], [True], False),
        ({"type": "array", "items": {"type": "integer"}}, [[1]], ["1"], False),
        ("dict", [{"a": [1, 2], "b": ["", "y"]}], {"a": 2}, True),
        ("dict", [{"a": [1, 2], "b": ["", "y"]}], {"a": 2, "b": "Y"}, True),
        ("dict", [{"a": [1, 2], "b": ["", "y"]}], {"b": "y"}, False),
        ("dict", [{"a": [1]}], {"a": 1, "c": 2}, False),
        ("dict", [{"a": [1]}], {"a": True}, False),
        ("object", [{"a": [{"b": [1]}]}], {"a": {"b": 1}}, True),
        ({"type": "array", "items": {"type": "dict"}}, [[{"a": [1]}]], [{"a": 1}], True),
        ({"type": "array", "items": {"type": "dict"}}, [[{"a": [1]}]], [{"a": 2}], False),
        ({"type": ["string", "null"]}, ["a"], "A", True),
        ({}, [5], 5, True),
    ],
)
def test_values(schema, acceptable, value, expected):
    assert verdict(schema, acceptable, value) is expected


def test_tuples_of_python_syntax():
    reference = [{"f": {"x": [[1, 2]]}}]
    pair = {"type": "tuple", "items": {"type": "integer"}}
    assert grade(reference, [tool(x=pair)], "f(x=(1, 2))").correct
    assert not grade(reference, [tool(x="array")], "f(x=(1, 2))").correct


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("f(x=1)", "calls match"),
        ("f(x=1, y='km')", "calls match"),
        ("f(y='km')", "argument x is missing"),
        ("f(x=1, z=2)", "argument z is not expected"),
        ("f(x=1, y='mile')", "y is 'mile', not one of ['km', '']"),
        ("g(x=1)", "g is called instead of f"),
        ("[f(x=1), f(x=1)]", "2 calls instead of 1"),
        ("f", "f is not a call"),
    ],
)
def test_arguments(text, detail):
    grade_ = grade([{"f": {"x": [1], "y": ["km", ""]}}], [tool(x="integer", y="string")], text)
    assert grade_.correct == (detail == "calls match")
    assert grade_.detail == detail


def test_an_argument_that_must_be_given_though_it_is_not_required():
    tools = [tool(x="integer", y="string")]
    assert (
        grade([{"f": {"x": [1], "y": ["km"]}}], tools, "f(x=1)").detail == "argument y is missing"
    )


def test_calls_in_any_order_and_each_once():
    tools = [tool("f", x="integer"), tool("g", x="integer")]
    reference = [{"f": {"x": [1]}}, {"f": {"x": [1, 2]}}, {"g": {"x": [3]}}]
    assert grade(reference, tools, "[g(x=3), f(x=1), f(x=2)]").correct
    assert not grade(reference, tools, "[g(x=3), f(x=1), f(x=3)]").correct
    assert not grade(reference, tools, "[g(x=3), f(x=2), f(x=2)]").correct


def test_names_with_dots_are_served_without():
    reference, tools = [{"math.f": {"x": [1]}}], [tool("math.f", x="integer")]
    assert grade(reference, tools, "math.f(x=1)").correct
    assert grade(reference, tools, '{"name": "math_f", "arguments": {"x": 1}}').correct


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("f(x=1)", "must be a list of calls"),
        ([], "must be a list of calls"),
        ([{"f": {}, "g": {}}], "one function's name"),
        ([{"g": {"x": [1]}}], "'g' is not among tools, which have"),
        ([{"f": {"x": 1}}], "f: each argument needs a list"),
        ([{"f": [1]}], "f: each argument needs a list"),
    ],
)
def test_bad_references(reference, message):
    with pytest.raises(DataError, match=message):
        check_reference(reference, [tool(x="integer")])
