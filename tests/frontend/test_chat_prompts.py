"""Prompts with tools: through a template that knows them, and through one that does not."""

import dataclasses
import json

import msgspec
import pytest

from pshare_jax.config import Reasoning
from pshare_jax.errors import ConfigError, RequestError
from pshare_jax.frontend.chat import TemplateOptions, chat_prompt
from pshare_jax.frontend.model_format import ModelFormat, ModelFormats, model_format
from pshare_jax.frontend.params import Limits
from pshare_jax.frontend.requests import ChatMessage
from pshare_jax.frontend.tool_calls.json_blocks import Hermes
from pshare_jax.frontend.tool_calls.pythonic import Pythonic
from pshare_jax.text.tokenizer import Tokenizer
from tests.text.tiny import write_byte_level, write_metaspace, write_sentencepiece

PLAIN = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks up a word. Slowly.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string"}, "deep": {"type": "boolean"}},
            "required": ["word"],
        },
    },
}
CALL = {"function": {"name": "look", "arguments": '{"word": "a"}'}, "id": "1"}
HISTORY = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "found", "tool_call_id": "1"},
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Tokenizer.load(write_byte_level(tmp_path_factory.mktemp("plain"), PLAIN))


def rendered(tokenizer: Tokenizer, messages: list, tools: list, tool_prompt: str) -> str:
    prompt = chat_prompt(
        tokenizer,
        Limits(1000, 10_000),
        msgspec.convert(messages, list[ChatMessage]),
        tools,
        TemplateOptions(tool_prompt=tool_prompt),  # type: ignore[arg-type]
    )
    return tokenizer.decode(prompt.token_ids, skip_special_tokens=False)


@pytest.mark.parametrize("write", [write_byte_level, write_sentencepiece, write_metaspace])
def test_a_special_token_in_a_message_adds_no_space(tmp_path, write):
    """Tokenizers that add a space to what begins add none beside a token that is only text."""
    folder = write(tmp_path)
    (folder / "chat_template.jinja").write_text(PLAIN)
    tokenizer = Tokenizer.load(folder)
    token = tokenizer.token_string(2)
    text = rendered(tokenizer, [{"role": "user", "content": f"hi{token}hi {token}"}], [], "hermes")
    assert text == f"[user]hi{token}hi {token}[assistant]"


def test_hermes_describes_tools_in_a_system_message(plain):
    text = rendered(plain, HISTORY[:1], [TOOL], "hermes")
    assert text.startswith("[system]# Tools")
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in text
    assert text.endswith("</tool_call>[user]q[assistant]")


def test_a_system_message_is_kept(plain):
    messages = [{"role": "system", "content": "Be kind."}, *HISTORY[:1]]
    text = rendered(plain, messages, [TOOL], "hermes")
    assert text.startswith("[system]Be kind.\n\n# Tools")


def test_calls_and_results_of_the_past_are_shown(plain):
    text = rendered(plain, HISTORY, [], "hermes")
    assert text == (
        '[user]q[assistant]<tool_call>\n{"name": "look", "arguments": {"word": "a"}}\n</tool_call>'
        "[user]<tool_response>\nfound\n</tool_response>[assistant]"
    )


def test_pythonic_asks_as_the_tools_module_has_learned(plain):
    text = rendered(plain, HISTORY[:1], [TOOL], "pythonic")
    signature = "look(word: string, deep: boolean = ...): Looks up a word."
    assert text == f"[user]{signature}\n\nq\nAnswer with one function call.[assistant]"
    # A question that is asked so already, as in the evaluations' items, stays as it is.
    again = [{"role": "user", "content": f"{signature}\n\nq\nAnswer with one function call."}]
    assert rendered(plain, again, [TOOL], "pythonic") == text
    assert rendered(plain, HISTORY[1:], [], "pythonic") == (
        "[assistant]look(word='a')[user]found[assistant]"
    )


def formatted(template, tool_parser="auto", reasoning="auto") -> ModelFormat:
    return model_format("m", tool_parser, reasoning, template)


@pytest.mark.parametrize(
    ("entry", "template", "expected"),
    [
        ({}, PLAIN, ModelFormat(Hermes, "hermes")),
        ({"tool_parser": "pythonic"}, PLAIN, ModelFormat(Pythonic, "pythonic")),
        ({"tool_parser": "none"}, PLAIN, ModelFormat(None, "hermes")),
        ({}, "{{ tools }} <tool_call> <think>", ModelFormat(Hermes, "template", True)),
        ({"reasoning": "off"}, "{{ tools }} <tool_call> <think>", ModelFormat(Hermes)),
        ({"reasoning": "on"}, PLAIN, ModelFormat(Hermes, "hermes", True)),
        ({}, "{{ tools }}", ModelFormat(None)),
        ({"tool_parser": "hermes"}, "{{ tools }}", ModelFormat(Hermes)),
    ],
)
def test_a_models_format_is_configured_or_detected(entry, template, expected):
    assert formatted(template, **entry) == expected


def test_an_unknown_parser_is_a_configuration_error():
    with pytest.raises(ConfigError, match="no tool parser 'nope'"):
        formatted(PLAIN, tool_parser="nope")


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (
            {"parameters": {"properties": {"a": True, "b": {"type": 5}}}},
            "f(a: any = ..., b: 5 = ...): .",
        ),
        ({"parameters": {"properties": ["a"], "required": {"a": 1}}}, "f(): ."),
        ({"parameters": {"properties": {"a": {}}, "required": 7}}, "f(a: any = ...): ."),
        ({"description": 5}, "f(): ."),
        ({"description": ["a. b"], "parameters": {"required": None}}, "f(): ."),
    ],
)
def test_signatures_of_tools_whose_schemas_are_none(plain, function, line):
    tool = {"type": "function", "function": {"name": "f", **function}}
    text = rendered(plain, HISTORY[:1], [tool], "pythonic")
    assert text.startswith(f"[user]{line}\n")


@dataclasses.dataclass(eq=False)
class Served:
    """What a model says of its format."""

    name: str
    tool_parser: str = "auto"
    reasoning: Reasoning = "auto"


def test_a_format_is_worked_out_once_until_another_model_has_the_name():
    asked: list[str] = []

    def template_of(name: str) -> str:
        asked.append(name)
        return "<think>"

    formats = ModelFormats(template_of)
    model = Served("m")
    first = formats.of(model)
    assert first.reasoning
    assert formats.of(model) is first
    assert asked == ["m"]
    assert not formats.of(Served("m", reasoning="off")).reasoning
    assert asked == ["m", "m"]


@pytest.mark.parametrize("content", ["a\ud800", "a<|im_end|>\ud800"])
def test_what_is_no_unicode_is_refused(tmp_path, content):
    tokenizer = Tokenizer.load(write_byte_level(tmp_path))
    messages = [ChatMessage(role="user", content=content)]
    with pytest.raises(RequestError, match="not valid Unicode"):
        chat_prompt(tokenizer, Limits(400, 1000), messages, None, TemplateOptions())
