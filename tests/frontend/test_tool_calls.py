"""Parsers of tool calls: right, and the same however the text is cut."""

import json
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pshare_jax.errors import ConfigError
from pshare_jax.frontend.tool_calls import detect, parser_named, register
from pshare_jax.frontend.tool_calls.json_blocks import Hermes
from pshare_jax.frontend.tool_calls.parts import CallArguments, CallStart, Part, Text
from pshare_jax.frontend.tool_calls.syntax import parse_calls

NAMES = ("get_weather", "get", "math_sqrt", "noop")
WEATHER = '{"city": "Pa\\"r}is", "days": [1, 2, {"a": "]"}]}'


@dataclass
class Result:
    text: str = ""
    calls: list[list[str]] = field(default_factory=list)

    def add(self, parts: list[Part]) -> None:
        for part in parts:
            match part:
                case Text(text):
                    assert text
                    self.text += text
                case CallStart(index, name):
                    assert index == len(self.calls)
                    self.calls.append([name, ""])
                case CallArguments(index, text):
                    assert index == len(self.calls) - 1
                    assert text
                    self.calls[index][1] += text


def read(name: str, text: str, cuts: list[int] | None = None) -> Result:
    parser = parser_named(name)(NAMES)
    result, start = Result(), 0
    for cut in [*sorted(cuts or []), len(text)]:
        result.add(parser.push(text[start:cut]))
        start = cut
    result.add(parser.finish())
    return result


def call(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def unclosed(arguments: str) -> str:
    """A call without the braces at its end."""
    return f'<tool_call>{{"name": "f", "arguments": {arguments}</tool_call>'


def tagged(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in calls)


W = ["get_weather", WEATHER]
CASES = [
    # (parser, text, content, calls)
    (
        "hermes",
        tagged('{"name": "get", "arguments": {"code": "a\n\tb\\n", "n": 1\n}}'),
        "",
        [["get", '{"code": "a\\n\\tb\\n", "n": 1\n}']],
    ),
    ("hermes", "just text", "just text", []),
    ("hermes", "a < b <tool", "a < b <tool", []),
    ("hermes", tagged(call("get_weather", WEATHER)), "", [W]),
    ("hermes", "I look. \n" + tagged(call("get_weather", WEATHER)), "I look.", [W]),
    ("hermes", tagged(call("get_weather", WEATHER), call("noop", "{}")), "", [W, ["noop", "{}"]]),
    ("hermes", "<tool_call>" + call("noop", "{}") + "</tool_call> then", " then", [["noop", "{}"]]),
    ("hermes", tagged('{"name": "noop"}'), "", [["noop", "{}"]]),
    # The last brace is forgotten.
    ("hermes", tagged(call("get_weather", WEATHER)[:-1]), "", [W]),
    (
        "hermes",
        tagged(call("noop", "{}")[:-1], call("get", "{}")),
        "",
        [["noop", "{}"], ["get", "{}"]],
    ),
    ("hermes", "<tool_call>" + call("noop", "{}")[:-1] + " and so", "and so", [["noop", "{}"]]),
    # So is that of the arguments; a tag within a text is a part of it.
    ("hermes", unclosed('{"x": 1') + " then", " then", [["f", '{"x": 1}']]),
    ("hermes", unclosed('{"x": "</tool_call>"\n'), "", [["f", '{"x": "</tool_call>"\n}']]),
    # More than a brace is not made up.
    ("hermes", unclosed('{"x": [1'), "", [["f", '{"x": [1']]),
    ("hermes", tagged('{"name": "noop", "arguments": null}'), "", [["noop", "{}"]]),
    ("hermes", tagged('{"arguments": {"x": 1}, "name": "get"}'), "", [["get", '{"x": 1}']]),
    (
        "hermes",
        tagged('{"name": "get", "arguments": "{\\"x\\": 1}"}'),
        "",
        [["get", '{"x": 1}']],
    ),
    (
        "hermes",
        tagged('{"type": "function", "function": {"name": "get", "arguments": {"x": {}}}}'),
        "",
        [["get", '{"x": {}}']],
    ),
    ("hermes", tagged(f"[{call('noop', '{}')}, {call('get', '{}')}]"), "", None),
    # Of another name than any tool's: within tags it is a call all the same.
    ("hermes", tagged(call("other", "{}")), "", [["other", "{}"]]),
    # Cut off by max_tokens.
    ("hermes", '<tool_call>\n{"name": "get", "arguments": {"x', "", [["get", '{"x']]),
    ("hermes", '<tool_call>\n{"name": "get"', '<tool_call>\n{"name": "get"', []),
    # No calls at all.
    ("hermes", "<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
    ("hermes", "x \n<tool_call>nonsense", "x \n<tool_call>nonsense", []),
    ("hermes", "x <tool_call>\n</tool_call> y", "x <tool_call>\n</tool_call> y", []),
    ("hermes", '<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
    ("hermes", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    ("llama3_json", call("get_weather", WEATHER, "parameters"), "", [W]),
    ("llama3_json", " \n<|python_tag|>" + call("get_weather", WEATHER), "", [W]),
    (
        "llama3_json",
        call("get_weather", WEATHER, "parameters") + "; " + call("noop", "{}", "parameters"),
        "",
        [W, ["noop", "{}"]],
    ),
    ("llama3_json", '{"name": "Bob", "age": 5}', '{"name": "Bob", "age": 5}', []),
    ("llama3_json", call("other", "{}"), call("other", "{}"), []),
    ("llama3_json", "Hello {", "Hello {", []),
    ("llama3_json", "  hello", "  hello", []),
    ("llama3_json", "<|python", "<|python", []),
    ("mistral", f"[TOOL_CALLS][{call('get_weather', WEATHER)}]", "", [W]),
    (
        "mistral",
        f"Well [TOOL_CALLS] [{call('get_weather', WEATHER)}, {call('noop', '{}')}]",
        "Well",
        [W, ["noop", "{}"]],
    ),
    (
        "mistral",
        f"[TOOL_CALLS]get_weather[ARGS]{WEATHER}[TOOL_CALLS]noop[ARGS]{{}}",
        "",
        [W, ["noop", "{}"]],
    ),
    (
        "mistral",
        f"[TOOL_CALLS]get_weather[CALL_ID]aB3dE6gH9[ARGS]{WEATHER}[TOOL_CALLS]noop[CALL_ID]x{{}}",
        "",
        [W, ["noop", "{}"]],
    ),
    ("mistral", "[TOOL_CALLS]noop[CALL_ID]x", "[TOOL_CALLS]noop[CALL_ID]x", []),
    ("mistral", f"[TOOL_CALLS]get_weather{WEATHER}", "", [W]),
    ("mistral", "[TOOL_CALLS]what is this", "[TOOL_CALLS]what is this", []),
    ("mistral", "a [TOOL_CALLS] b", "a [TOOL_CALLS] b", []),
    ("mistral", "[TOOL] nothing", "[TOOL] nothing", []),
    ("pythonic", "get(x=1)", "", [["get", '{"x": 1}']]),
    (
        "pythonic",
        "[get(x=1), get_weather(city='P(a]ris', days=[1, (2, 3)])]",
        "",
        [["get", '{"x": 1}'], ["get_weather", '{"city": "P(a]ris", "days": [1, [2, 3]]}']],
    ),
    ("pythonic", "\nmath.sqrt(x=2.0)\n", "", [["math_sqrt", '{"x": 2.0}']]),
    ("pythonic", "noop()", "", [["noop", "{}"]]),
    ("pythonic", "noop() and more", " and more", [["noop", "{}"]]),
    ("pythonic", "get is a word", "get is a word", []),
    ("pythonic", "other(x=1)", "other(x=1)", []),
    ("pythonic", "get(1)", "get(1)", []),
    ("pythonic", " [get(x=1", " [get(x=1", []),
    ("pythonic", "[1, 2]", "[1, 2]", []),
    ("pythonic", "get(x=float('inf'))", "", [["get", '{"x": "float(\'inf\')"}']]),
    ("pythonic", "get(x=1e999)", "get(x=1e999)", []),
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES, ids=lambda v: str(v)[:40])
def test_the_parts_of_an_answer(name, text, content, calls):
    expected = [["noop", "{}"], ["get", "{}"]] if calls is None else calls
    whole = read(name, text)
    assert (whole.text, whole.calls) == (content, expected)
    # One character at a time, at every single cut, and at random ones.
    assert read(name, text, list(range(len(text)))) == whole
    for cut in range(len(text)):
        assert read(name, text, [cut]) == whole
    rng = random.Random(0)
    for _ in range(20):
        cuts = rng.sample(range(len(text) + 1), rng.randint(0, len(text)))
        assert read(name, text, cuts) == whole


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral", "pythonic"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_text_is_read_the_same_however_cut(name, data):
    alphabet = st.sampled_from(
        ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
         "<|python_tag|>", "get", "noop",
         '{"name": "get", "arguments": {}}', '"name"', '"arguments"', "{", "}", "[", "]", "(", ")",
         '"', "\\", ":", ",", " ", "\n", "x", "=", "1", "'"]
    )  # fmt: skip
    text = "".join(data.draw(st.lists(alphabet, max_size=14)))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=5))
    whole = read(name, text)
    assert read(name, text, cuts) == whole
    assert read(name, text, list(range(len(text)))) == whole
    if not whole.calls:
        assert whole.text == text


def test_arguments_come_while_they_are_written():
    parser = Hermes(NAMES)
    text = tagged(call("get", '{"path": "' + "x" * 50 + '"}'))
    told = [len(parser.push(char)) for char in text]
    name = text.index('{"path')
    assert sum(told[:name]) == 0
    assert told[name] == 2  # the name, and the first character of the arguments
    assert all(told[name + 1 : name + 50])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.text(max_size=8), st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3)
            | st.dictionaries(st.text(max_size=4), inner, max_size=3),
            max_leaves=6,
        ), max_size=4,
    )
)  # fmt: skip
def test_any_arguments_survive(arguments):
    for indent in (None, 2):
        text = tagged(json.dumps({"name": "get", "arguments": arguments}, indent=indent))
        ((_, streamed),) = read("hermes", text, list(range(0, len(text), 3))).calls
        assert json.loads(streamed) == arguments
        # What the evaluations read of a whole text is the same call.
        (graded,) = parse_calls(text)
        assert (graded.name, graded.arguments) == ("get", arguments)


def test_a_long_call_takes_no_quadratic_time():
    arguments = json.dumps({"text": "x" * 300_000})
    result = read("hermes", tagged(call("get", arguments)), list(range(0, 300_000, 7)))
    assert result.calls == [["get", arguments]]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (
            "{% if tools %}<tools>..</tools> within <tool_call></tool_call> tags{% endif %}",
            "hermes",
        ),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("{{ '<|python_tag|>' + message.tool_calls }}", "llama3_json"),
        ("[func_name1(params_name1=params_value1)]", "pythonic"),
        ('<function=example_function_name>{{"example_name": "value"}}</function>', None),
        ("{{ messages }}", None),
    ],
)
def test_templates_are_recognised(template, name):
    assert detect(template) == name


def test_a_parser_can_be_added():
    class Shouting(Hermes):
        opening, closing = "<CALL>", "</CALL>"

    register("shouting", Shouting)
    register("shouting", Shouting)
    assert read("shouting", "<CALL>" + call("noop", "{}") + "</CALL>").calls == [["noop", "{}"]]
    with pytest.raises(ConfigError, match="registered already"):
        register("shouting", Hermes)
    with pytest.raises(ConfigError, match="no tool parser 'x'; there are hermes, llama3_json"):
        parser_named("x")


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral", "pythonic"])
@pytest.mark.parametrize("filler", [" ", "[", ";", "\n ["])
def test_separators_without_end_take_no_quadratic_time(name, filler):
    """A model may fall into endless white space, and a token of it may be a hundred characters."""
    opening = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]"}.get(name, "")
    text = opening + filler * (600_000 // len(filler))
    assert read(name, text).text == text
    called = opening + filler * 3 + ("noop()" if name == "pythonic" else call("noop", "{}"))
    if name != "pythonic" or ";" not in filler:
        assert read(name, called, list(range(len(called)))) == read(name, called)
