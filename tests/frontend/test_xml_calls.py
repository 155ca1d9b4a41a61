"""Qwen 3 Coder's calls: read right, the same however the text is cut, and forced by a grammar."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from pshare_jax.errors import RequestError
from pshare_jax.frontend.tool_calls import detect, parser_named
from pshare_jax.frontend.tool_calls.grammars import calls_grammar
from pshare_jax.frontend.tool_calls.parts import CallArguments
from pshare_jax.text.grammar import GrammarLimits
from tests.frontend.test_tool_calls import Result

EDIT = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "line": {"type": "integer"},
        "ratio": {"type": "number"},
        "all": {"type": "boolean"},
        "lines": {"type": "array", "items": {"type": "integer"}},
        "options": {"$ref": "#/$defs/Options"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "mode": {"enum": ["fast", "slow"]},
    },
    "required": ["path"],
    "$defs": {"Options": {"type": "object", "properties": {"deep": {"type": "boolean"}}}},
}
SCHEMAS = {"edit": EDIT, "noop": None}


def read(text: str, cuts: list[int] | None = None) -> Result:
    parser = parser_named("qwen3_coder")(SCHEMAS)
    result, start = Result(), 0
    for cut in [*sorted(cuts or []), len(text)]:
        result.add(parser.push(text[start:cut]))
        start = cut
    result.add(parser.finish())
    return result


def call(name: str, **values: str) -> str:
    lines = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items()]
    return f"<tool_call>\n<function={name}>\n{''.join(lines)}</function>\n</tool_call>"


def edit(**values: str) -> str:
    return call("edit", **values)


CODE = 'if a < b:\n    print("<b>é</b>")\n'
CASES = {
    "no call": ("a < b <tool", "a < b <tool", []),
    "no parameters": (call("noop"), "", [["noop", "{}"]]),
    "text before": ("I look. \n" + call("noop"), "I look.", [["noop", "{}"]]),
    "text after": (call("noop") + " then", " then", [["noop", "{}"]]),
    "two": (
        call("noop") + "\n" + edit(path="x"),
        "",
        [["noop", "{}"], ["edit", '{"path": "x"}']],
    ),
    "code": (edit(path=CODE), "", [["edit", json.dumps({"path": CODE}, ensure_ascii=False)]]),
    "an empty text": (edit(path=""), "", [["edit", '{"path": ""}']]),
    "tags within a text": (
        edit(path="a\n</parameter>\nb </function> c <parameter=x>", line="3"),
        "",
        [["edit", '{"path": "a\\n</parameter>\\nb </function> c <parameter=x>", "line": 3}']],
    ),
    "values by their types": (
        edit(line="12", ratio="0.5", all="True", lines="[1, 2]", options='{"deep": true}'),
        "",
        [
            [
                "edit",
                '{"line": 12, "ratio": 0.5, "all": true, "lines": [1, 2], '
                '"options": {"deep": true}}',
            ]
        ],
    ),
    "a number that is whole": (
        edit(line="3.0", ratio="2"), "", [["edit", '{"line": 3, "ratio": 2}']],
    ),
    "python's literals": (
        edit(options="{'deep': True}"), "", [["edit", '{"options": {"deep": true}}']],
    ),
    "nothing": (edit(note="null"), "", [["edit", '{"note": null}']]),
    "text or nothing": (edit(note="nullable"), "", [["edit", '{"note": "nullable"}']]),
    "a choice": (edit(mode="fast"), "", [["edit", '{"mode": "fast"}']]),
    "not what it should be": (edit(line="many"), "", [["edit", '{"line": "many"}']]),
    "infinite": (edit(ratio="1e999"), "", [["edit", '{"ratio": "1e999"}']]),
    "a parameter that nobody knows": (edit(other="5"), "", [["edit", '{"other": "5"}']]),
    "a function that nobody knows": (call("other"), "", [["other", "{}"]]),
    "without the outer tag": ("<function=noop>\n</function>", "", [["noop", "{}"]]),
    "text that looks like it": (
        "write x\n <function=f> here",
        "write x\n <function=f> here",
        [],
    ),
    "values on the tags' line": (
        "<tool_call><function=edit><parameter=path>x</parameter></function></tool_call>",
        "",
        [["edit", '{"path": "x"}']],
    ),
    "the end of a parameter is missing": (
        "<tool_call>\n<function=edit>\n<parameter=path>\nx\n</function>\n</tool_call>",
        "",
        [["edit", '{"path": "x"}']],
    ),
    "the end of the function is missing": (
        "<tool_call>\n<function=edit>\n<parameter=path>\nx\n</parameter>\n</tool_call>",
        "",
        [["edit", '{"path": "x"}']],
    ),
    "cut in a text": (
        "<tool_call>\n<function=edit>\n<parameter=path>\nx\n</par",
        "",
        [["edit", '{"path": "x\\n</par']],
    ),
    "cut in a number": (
        "<tool_call>\n<function=edit>\n<parameter=line>\n12",
        "",
        [["edit", '{"line": 12']],
    ),
    "cut in a name": ("x <tool_call>\n<function=ed", "x <tool_call>\n<function=ed", []),
    "nonsense": (" <tool_call>nonsense</tool_call>", " <tool_call>nonsense</tool_call>", []),
    "empty tags": ("x <tool_call>\n</tool_call>", "x <tool_call>\n</tool_call>", []),
    "tags twice": ("<tool_call>" + call("noop"), "<tool_call>", [["noop", "{}"]]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "content", "calls"), CASES.values(), ids=CASES)
def test_the_parts_of_an_answer(text, content, calls):
    whole = read(text)
    assert (whole.text, whole.calls) == (content, calls)
    assert read(text, list(range(len(text)))) == whole
    for cut in range(len(text)):
        assert read(text, [cut]) == whole
    rng = random.Random(0)
    for _ in range(20):
        assert read(text, rng.sample(range(len(text) + 1), rng.randint(0, len(text)))) == whole


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_text_is_read_the_same_however_cut(data):
    pieces = [
        "<tool_call>", "</tool_call>", "<function=", "edit>", "noop>", "</function>", "<parameter=",
        "path>", "line>", "</parameter>", "<", ">", "\n", " ", "x", "1",
    ]  # fmt: skip
    text = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=16)))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=5))
    whole = read(text)
    assert read(text, cuts) == whole
    assert read(text, list(range(len(text)))) == whole
    if not whole.calls:
        assert whole.text == text


def test_a_text_comes_while_it_is_written():
    parser = parser_named("qwen3_coder")(SCHEMAS)
    text = edit(path="y" * 50)
    told = [len(parser.push(char)) for char in text]
    first = text.index("y")
    assert all(told[first : first + 50])


def test_a_long_call_takes_no_quadratic_time():
    value = "x<" * 150_000
    result = read(edit(path=value), list(range(0, 300_000, 7)))
    assert result.calls == [["edit", json.dumps({"path": value})]]


def test_the_template_of_the_family_is_recognised():
    template = "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>"
    assert detect(template) == "qwen3_coder"


def grammar(schema: dict, **options) -> str:
    functions = [{"name": "edit", "parameters": schema}, {"name": "noop"}]
    spec = calls_grammar(
        "qwen3_coder",
        functions,
        token_id=lambda _: None,
        limits=GrammarLimits(),
        **{"one_call": True, **options},
    )
    return LLMatcher.grammar_from_lark(spec.source)


def follows(source: str, text: str) -> bool:
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, source, log_level=0)
    ids = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def test_calls_can_be_forced():
    forced = grammar(EDIT)
    for text in (
        call("noop"),
        edit(path=CODE),
        edit(path="a\n</parameter> b", line="12", mode="slow"),
        edit(path="", ratio="0.5", all="true", lines="[1,2]", options='{"deep":true}'),
        edit(path="x", note="null"),
    ):
        assert follows(forced, text), text
    for text in (
        "text",
        edit(line="1"),
        edit(path="x", line="one"),
        edit(path="x", mode="other"),
        call("other"),
        call("noop") + "\n" + call("noop"),
    ):
        assert not follows(forced, text), text
    assert follows(grammar(EDIT, one_call=False), call("noop") + "\n" + edit(path="x"))


def test_the_length_of_a_text_is_kept():
    schema = {"properties": {"path": {"type": "string", "minLength": 2, "maxLength": 3}}}
    forced = grammar({**schema, "required": ["path"]})
    assert [follows(forced, edit(path="x" * count)) for count in range(1, 5)] == [
        False, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("keyword", ["pattern", "format"])
def test_what_bare_text_cannot_be_held_to_is_refused(keyword):
    schema = {"properties": {"path": {"type": "string", keyword: "date"}}}
    with pytest.raises(RequestError, match=f"'path' is bare text .* {keyword!r}"):
        grammar(schema)


def test_references_without_end_are_followed_once():
    """A schema of a few lines that refers to itself in fifty ways, in four places."""
    many = {"anyOf": [{"$ref": f"#/$defs/d{n}"} for n in range(50)]}
    schema = {
        "properties": {"line": {"$ref": "#/$defs/d0"}},
        "$defs": {f"d{n}": many for n in range(49)} | {"d49": {"type": "integer"}},
    }
    parser = parser_named("qwen3_coder")({"edit": schema})
    parts = parser.push(edit(line="7")) + parser.finish()
    told = "".join(part.text for part in parts if isinstance(part, CallArguments))
    assert told == '{"line": 7}'
