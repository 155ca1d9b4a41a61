"""Anthropic's Messages API, with the real client."""

import importlib
import json

import pytest

from pshare_jax.text.tokenizer import Tokenizer
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import running_server
from tests.serve.test_completions import script
from tests.serve.test_tools import ARGUMENTS, CALL, NOOP, TEMPLATE
from tests.text.tiny import write_byte_level

TOOLS = [
    {
        "name": "get_weather",
        "description": "The weather.",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
    {"name": "noop", "input_schema": {"type": "object"}},
]
USER = [{"role": "user", "content": "weather?"}]
WHOLE = f"<think>\nhmm\n</think>\n\nI look.\n{CALL}\n{NOOP}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    tokenizer = Tokenizer.load(write_byte_level(tmp_path_factory.mktemp("messages"), TEMPLATE))
    config = fake_config(max_model_len=2048, api_key="secret")
    with running_server(fake_engine(tokenizer, config)) as client:
        yield client


@pytest.fixture(scope="module")
def anthropic():
    # Where it is used: every process collects all tests.
    return importlib.import_module("anthropic")


@pytest.fixture
def api(anthropic, server):
    with anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as api:
        yield api.messages


def post(server, **fields):
    body = {"model": "planner", "max_tokens": 50, "messages": USER, **fields}
    return server.post("/v1/messages", body, **{"x-api-key": "secret"})


def prompt_text(server) -> str:
    return server.engine.tokenizer.decode(server.engine.submitted[-1].prompt_token_ids)


def test_text(server, api):
    script(server.engine, "hello world")
    message = api.create(
        model="planner",
        max_tokens=50,
        system=[{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        extra_body={"temperature": 0.5, "top_k": 3},
    )
    assert (message.type, message.role, message.model) == ("message", "assistant", "planner")
    assert [block.text for block in message.content] == ["hello world"]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert prompt_text(server) == "[system]Be kind.[user]hi"
    params = server.engine.submitted[-1].params
    assert (params.max_tokens, params.temperature, params.top_k) == (50, 0.5, 3)


def test_input_tokens_exclude_cached_ones(server, api):
    script(server.engine, "hello")
    asked = {
        "model": "planner",
        "max_tokens": 5,
        "messages": [{"role": "user", "content": "q" * 99}],
    }
    first, second = (api.create(**asked).usage for _ in range(2))
    assert first.cache_read_input_tokens == 0
    assert second.cache_read_input_tokens > 0
    assert second.input_tokens + second.cache_read_input_tokens == first.input_tokens
    assert (
        first.input_tokens
        == api.count_tokens(model="planner", messages=asked["messages"]).input_tokens
    )


def test_more_tokens_than_fit_are_as_many_as_fit(server, api):
    script(server.engine, "hello")
    with api.stream(model="planner", max_tokens=32_000, messages=USER) as stream:
        stream.until_done()
    request = server.engine.submitted[-1]
    assert request.params.max_tokens == 2048 - len(request.prompt_token_ids)


def test_thoughts_text_and_calls_are_blocks(server, api):
    script(server.engine, WHOLE)
    message = api.create(model="planner", max_tokens=500, messages=USER, tools=TOOLS)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    thoughts, text, weather, noop = message.content
    assert (thoughts.thinking, text.text) == ("hmm", "I look.")
    assert (weather.name, weather.input) == ("get_weather", json.loads(ARGUMENTS))
    assert (noop.name, noop.input) == ("noop", {})
    assert weather.id.startswith("toolu_")
    assert message.stop_reason == "tool_use"
    # It goes back as it is, with a result.
    result = {
        "role": "user",
        "content": [
            {
                "type": "tool_result",
                "tool_use_id": weather.id,
                "content": [{"type": "text", "text": "sunny"}],
            },
            {"type": "text", "text": "so?"},
        ],
    }
    script(server.engine, "Sunny.")
    turn = {"role": "assistant", "content": message.content}
    again = api.create(model="planner", max_tokens=500, messages=[*USER, turn, result], tools=TOOLS)
    assert again.content[0].text == "Sunny."
    text = prompt_text(server)
    assert text.startswith('[user]weather?[assistant]I look.<tool_call>{"name": "get_weather"')
    assert "[tool]sunny[user]so?" in text


@pytest.mark.parametrize("tokens_per_event", [1, 5, 1000])
def test_a_stream_tells_the_same(server, api, tokens_per_event):
    script(server.engine, WHOLE)
    server.engine.tokens_per_event = tokens_per_event
    asked = {"model": "planner", "max_tokens": 500, "messages": USER, "tools": TOOLS}
    whole = api.create(**asked)
    with api.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    server.engine.tokens_per_event = 1
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    for ours, theirs in zip(final.content, whole.content, strict=True):
        exclude = {"id", "parsed_output"}
        assert ours.model_dump(exclude=exclude) == theirs.model_dump(exclude=exclude)
    assert final.stop_reason == whole.stop_reason == "tool_use"
    assert final.usage.output_tokens == whole.usage.output_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "reason", "sequence"),
    [
        ({"max_tokens": 2}, "max_tokens", None),
        ({"stop_sequences": ["lo w"]}, "stop_sequence", "lo w"),
        ({}, "end_turn", None),
    ],
)
def test_why_it_ended(server, api, stream, fields, reason, sequence):
    script(server.engine, "hello world")
    asked = {"model": "planner", "max_tokens": 50, "messages": USER, **fields}
    if stream:
        with api.stream(**asked) as events:
            message = events.get_final_message()
    else:
        message = api.create(**asked)
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)


def test_errors_are_anthropics(anthropic, server, api):
    with pytest.raises(anthropic.NotFoundError) as caught:
        api.create(model="nobody", max_tokens=5, messages=USER)
    assert caught.value.body["error"]["type"] == "not_found_error"
    with (
        anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as other,
        pytest.raises(anthropic.AuthenticationError),
    ):
        other.messages.create(model="planner", max_tokens=5, messages=USER)
    with pytest.raises(anthropic.BadRequestError, match="system"):
        api.create(model="planner", max_tokens=5, messages=USER, system=[{"type": "image"}])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_choice": {"type": "any"}}, "needs tools"),
        ({"tool_choice": {"type": "tool", "name": "f"}, "tools": TOOLS}, "no tool 'f'"),
        ({"tool_choice": {"type": "tool"}, "tools": TOOLS}, "tool_choice.name must be a string"),
        ({"tool_choice": {"type": "some"}, "tools": TOOLS}, "auto, any, tool or none"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image'"),
        ({"messages": [{"role": "assistant", "content": [{"type": "x"}]}]}, "'x'"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
        ({"tools": [{"input_schema": {}}]}, "not a function tool"),
        ({"mcp_servers": [{"url": "x"}]}, "calls nobody"),
        ({"max_tokens": 1.5}, "Expected 'int', got 'float'"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "at least one message"),
    ],
)
def test_what_is_refused(server, fields, message):
    answer = post(server, **fields)
    assert answer.status == 400
    error = answer.json
    assert error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"
    assert message in error["error"]["message"]


def test_tool_choice_and_one_call(server):
    script(server.engine, CALL + NOOP)
    none = post(server, tools=TOOLS, tool_choice={"type": "none"}).json
    assert none["content"][0]["type"] == "text"
    one = post(
        server, tools=TOOLS, tool_choice={"type": "auto", "disable_parallel_tool_use": True}
    ).json
    assert [block["type"] for block in one["content"]] == ["tool_use"]


def test_broken_arguments_give_an_empty_input(server):
    script(server.engine, CALL)
    tokens = len(server.engine.tokenizer.encode(CALL))
    message = post(server, tools=TOOLS, max_tokens=tokens - 20).json
    assert message["stop_reason"] == "max_tokens"
    assert message["content"][0]["input"] == {}
