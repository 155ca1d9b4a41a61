"""Tools and thoughts in chats, with the real client."""

import dataclasses
import json

import openai
import pytest

from pshare_jax.config import ModelEntry
from pshare_jax.text.tokenizer import Tokenizer
from tests.serve.fake import MODELS, fake_config, fake_engine
from tests.serve.server import running_server
from tests.serve.test_completions import script
from tests.text.tiny import write_byte_level

USER = [{"role": "user", "content": "weather?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "noop", "parameters": {"type": "object"}}},
]
ARGUMENTS = '{"city": "Zürich 🙂"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
NOOP = '<tool_call>\n{"name": "noop"}\n</tool_call>'
# Knows tools, and says in which form calls are to be written; opens the thoughts when asked to.
TEMPLATE = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + (c.function | tojson) }}{% endfor %}"
    "{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if thinking %}{{ '<think>\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(write_byte_level(tmp_path_factory.mktemp("tools"), TEMPLATE))


@pytest.fixture(scope="module")
def server(tokenizer):
    entries = [ModelEntry(name) for name in MODELS]
    entries[1] = ModelEntry("coder", tool_parser="pythonic", reasoning="off")
    config = dataclasses.replace(fake_config(max_model_len=2048), models=entries)
    with running_server(fake_engine(tokenizer, config)) as client:
        yield client


@pytest.fixture
def api(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as api:
        yield api.chat.completions


def test_a_call_is_a_call(server, api):
    script(server.engine, f"I look.\n{CALL}\n{NOOP}")
    choice = api.create(model="planner", messages=USER, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    calls = choice.message.tool_calls
    assert [(c.function.name, c.function.arguments) for c in calls] == [
        ("get_weather", ARGUMENTS),
        ("noop", "{}"),
    ]
    assert {c.type for c in calls} == {"function"}
    assert all(c.id.startswith("call_") for c in calls)
    assert len({c.id for c in calls}) == 2
    # The answer goes back as it is, with the result.
    result = {"role": "tool", "tool_call_id": calls[0].id, "content": "sunny"}
    script(server.engine, "It is sunny.")
    again = api.create(
        model="planner", messages=[*USER, choice.message, result], tools=TOOLS
    ).choices[0]
    assert (again.message.content, again.message.tool_calls) == ("It is sunny.", None)
    assert again.finish_reason == "stop"


def test_content_is_null_beside_calls_only(server):
    script(server.engine, CALL)
    message = server.chat(tools=TOOLS).json["choices"][0]["message"]
    assert message["content"] is None
    assert "reasoning_content" not in message


@pytest.mark.parametrize("tokens_per_event", [1, 4, 1000])
def test_calls_are_streamed(server, api, tokens_per_event):
    script(server.engine, f"I look.\n{CALL}\n{NOOP}")
    server.engine.tokens_per_event = tokens_per_event
    with api.stream(model="planner", messages=USER, tools=TOOLS) as stream:
        chunks = [event.chunk for event in stream if event.type == "chunk"]
        final = stream.get_final_completion().choices[0]
    server.engine.tokens_per_event = 1
    assert final.finish_reason == "tool_calls"
    assert final.message.content == "I look."
    assert [(c.function.name, c.function.arguments) for c in final.message.tool_calls] == [
        ("get_weather", ARGUMENTS),
        ("noop", "{}"),
    ]
    deltas = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    firsts = [delta for delta in deltas if delta.id]
    assert [d.index for d in firsts] == [0, 1]
    assert all(d.function.name and d.type == "function" for d in firsts)
    assert all(d.function.name is None for d in deltas if not d.id)
    if tokens_per_event == 1:
        assert len([d for d in deltas if d.index == 0]) > 3


def test_no_two_calls_if_the_client_says_so(server, api):
    script(server.engine, CALL + NOOP)
    choice = api.create(
        model="planner", messages=USER, tools=TOOLS, parallel_tool_calls=False
    ).choices[0]
    assert [c.function.name for c in choice.message.tool_calls] == ["get_weather"]


def test_without_tools_calls_are_text(server):
    script(server.engine, CALL)
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = server.chat(**fields).json["choices"][0]
        assert choice["message"]["content"] == CALL
        assert choice["finish_reason"] == "stop"


def test_a_call_that_is_cut_off_has_finish_reason_length(server):
    script(server.engine, CALL)
    tokens = len(server.engine.tokenizer.encode(CALL))
    choice = server.chat(tools=TOOLS, max_tokens=tokens - 20).json["choices"][0]
    assert choice["finish_reason"] == "length"
    [call] = choice["message"]["tool_calls"]
    assert ARGUMENTS.startswith(call["function"]["arguments"])


def test_samples_are_read_apart(server):
    script(server.engine, CALL, "text", NOOP)
    choices = server.chat(tools=TOOLS, n=3).json["choices"]
    assert [c["finish_reason"] for c in choices] == ["tool_calls", "stop", "tool_calls"]
    script(server.engine, CALL, "text", NOOP)
    *chunks, _ = server.chat(tools=TOOLS, n=3, stream=True).events
    names = {
        (c["choices"][0]["index"], call["function"]["name"])
        for c in chunks
        for call in c["choices"][0]["delta"].get("tool_calls", [])
        if "name" in call["function"]
    }
    assert names == {(0, "get_weather"), (2, "noop")}


def test_another_model_writes_calls_otherwise(server):
    script(server.engine, "get_weather(city='Paris')")
    message = server.chat(model="coder", tools=TOOLS).json["choices"][0]["message"]
    assert message["tool_calls"][0]["function"] == {
        "name": "get_weather",
        "arguments": '{"city": "Paris"}',
    }


def test_logprobs_of_an_answer_with_calls(server):
    script(server.engine, CALL)
    whole = server.chat(tools=TOOLS, logprobs=True).json["choices"][0]
    *chunks, _ = server.chat(tools=TOOLS, logprobs=True, stream=True).events
    listed = [
        token
        for chunk in chunks
        if chunk["choices"][0]["logprobs"]
        for token in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert "".join(token["token"] for token in listed).replace("bytes", "").startswith("<tool_call")
    assert listed == whole["logprobs"]["content"]


class TestReasoning:
    def test_thoughts_are_apart(self, server, api):
        script(server.engine, "<think>\nhmm, 🙂\n</think>\n\nYes.")
        message = api.create(model="planner", messages=USER).choices[0].message
        assert (message.reasoning_content, message.content) == ("hmm, 🙂", "Yes.")
        stream = api.create(model="planner", messages=USER, stream=True)
        deltas = [chunk.choices[0].delta for chunk in stream]
        # How many tokens come in a delta is up to how quickly the client reads.
        thoughts = [getattr(d, "reasoning_content", None) or "" for d in deltas]
        contents = [d.content or "" for d in deltas]
        assert ("".join(thoughts), "".join(contents)) == ("hmm, 🙂", "Yes.")
        thinks, answers = (
            [i for i, t in enumerate(thoughts) if t],
            [i for i, c in enumerate(contents) if c],
        )
        # The last thought and the first of the answer may come in one, whose fields have no order.
        assert max(thinks) <= min(answers)

    def test_a_template_may_open_them(self, server):
        script(server.engine, "hmm</think>Yes.")
        message = server.chat(chat_template_kwargs={"thinking": True}).json["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("hmm", "Yes.")

    def test_a_model_without(self, server):
        script(server.engine, "<think>a</think>b")
        message = server.chat(model="coder").json["choices"][0]["message"]
        assert message["content"] == "<think>a</think>b"

    def test_either_spelling_comes_in(self, server):
        for field in ("reasoning_content", "reasoning"):
            messages = [*USER, {"role": "assistant", "content": "a", field: "t"}, *USER]
            body = {"model": "planner", "messages": messages}
            assert server.post("/v1/chat/completions", body).status == 200


class TestFunctions:
    FUNCTIONS = tuple(tool["function"] for tool in TOOLS)

    def test_the_older_form(self, server, api):
        script(server.engine, CALL + NOOP)
        choice = api.create(
            model="planner", messages=USER, functions=self.FUNCTIONS, function_call="auto"
        ).choices[0]
        assert choice.finish_reason == "function_call"
        assert choice.message.function_call.name == "get_weather"
        assert choice.message.function_call.arguments == ARGUMENTS
        assert choice.message.tool_calls is None
        *chunks, _ = server.chat(functions=self.FUNCTIONS, stream=True).events
        deltas = [c["choices"][0]["delta"].get("function_call") for c in chunks]
        assert "".join(d["arguments"] for d in deltas if d) == ARGUMENTS

    def test_its_results_come_back(self, server):
        call = {"name": "noop", "arguments": "{}"}
        messages = [
            *USER,
            {"role": "assistant", "content": None, "function_call": call},
            {"role": "function", "name": "noop", "content": "done"},
        ]
        body = {"model": "planner", "messages": messages}
        assert server.post("/v1/chat/completions", body).status == 200
        ids = server.engine.submitted[-1].prompt_token_ids
        text = server.engine.tokenizer.decode(ids)
        assert text == '[user]weather?[assistant]<tool_call>{"name": "noop", "arguments": {}}' + (
            "[tool]done"
        )

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"functions": [{"name": "f"}], "tools": TOOLS}, "functions"),
            ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call"),
            ({"functions": [{}]}, "tools[0]"),
            ({"tools": [], "tool_choice": "required"}, "tool_choice"),
            (
                {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nope"}}},
                "tool_choice",
            ),
        ],
    )
    def test_what_is_refused(self, server, fields, param):
        answer = server.chat(**fields)
        assert (answer.status, answer.error["param"]) == (400, param)


def test_special_tokens_of_a_format_reach_its_parser(tmp_path):
    folder = write_byte_level(tmp_path, TEMPLATE)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
    # <|im_start|> plays the part of a format's special token.
    tokenizer = Tokenizer.load(folder)
    text = [ids["<|im_start|>"], *tokenizer.encode("hi"), ids["<|endoftext|>"]]
    for shown, expected in [((), "hi"), (("<|im_start|>", "[NONE]"), "<|im_start|>hi")]:
        detokenizer = tokenizer.detokenizer(True, shown)
        assert "".join(map(detokenizer.push, text)) == expected
