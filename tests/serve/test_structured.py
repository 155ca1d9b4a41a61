"""Structured output over HTTP: every spelling, every endpoint, with the real clients."""

import json
import re
from dataclasses import replace
from typing import Literal

import jsonschema
import openai
import pydantic
import pytest

from pshare_jax.config import ModelEntry, ServeConfig, ServerConfig
from pshare_jax.text.tokenizer import Tokenizer
from tests.serve.fake import fake_engine
from tests.serve.masked import masked_answers
from tests.serve.server import running_server
from tests.text.tiny import CHAT_TEMPLATE, write_byte_level

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 5},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
PARAMETERS = {**SCHEMA, "additionalProperties": True}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "halt"}},
]
STYLES = ("hermes", "llama3_json", "mistral", "pythonic")
THINKING = CHAT_TEMPLATE + "{# <think> #}"


@pytest.fixture(scope="module")
def server(tokenizer):
    """A model for each form of calls, and one that thinks."""
    config = ServeConfig(
        base="fake",
        models=[*(ModelEntry(style, tool_parser=style) for style in STYLES)],
        max_model_len=4096,
        server=ServerConfig(port=0),
    )
    engine = fake_engine(tokenizer, config)
    model = next(iter(engine.models.values()))
    engine.models = {style: replace(model, name=style, tool_parser=style) for style in STYLES}
    engine.script = masked_answers(engine)
    with running_server(engine) as client:
        yield client


def chat(server, model="hermes", **fields):
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "weather?"}],
        "max_tokens": 300,
        "seed": 1,
        **fields,
    }
    answer = server.post("/v1/chat/completions", body)
    assert answer.status == 200, answer.body
    return answer


def complete(server, **fields):
    body = {"model": "hermes", "prompt": "weather?", "max_tokens": 300, "seed": 1, **fields}
    answer = server.post("/v1/completions", body)
    assert answer.status == 200, answer.body
    return answer.json["choices"][0]


def content(answer):
    (choice,) = answer.json["choices"]
    assert choice["finish_reason"] == "stop"
    return choice["message"]["content"]


def check(text):
    jsonschema.validate(json.loads(text), SCHEMA)


SPELLINGS = [
    ({"response_format": JSON_SCHEMA}, check),
    ({"structured_outputs": {"json": SCHEMA}}, check),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, check),
    ({"guided_json": SCHEMA}, check),
    ({"structured_outputs": {"regex": "[a-c]{3}-[0-9]"}}, re.compile("[a-c]{3}-[0-9]").fullmatch),
    ({"guided_regex": "(yes|no)!"}, ("yes!", "no!").__contains__),
    ({"structured_outputs": {"choice": ["good", "bad"]}}, ("good", "bad").__contains__),
    ({"guided_choice": ["good"]}, ("good",).__contains__),
    ({"guided_grammar": 'start: "a" ("b" | "c")'}, ("ab", "ac").__contains__),
]


@pytest.mark.parametrize(
    ("fields", "valid"),
    SPELLINGS,
    ids=[f"{n}-{next(iter(f))}" for n, (f, _) in enumerate(SPELLINGS)],
)
def test_every_spelling_on_both_endpoints(server, fields, valid):
    for seed in range(3):
        assert valid(content(chat(server, seed=seed, **fields))) is not False
        choice = complete(server, seed=seed, **fields)
        assert choice["finish_reason"] == "stop"
        assert valid(choice["text"]) is not False


def test_a_json_object(server):
    texts = []
    for seed in range(8):
        answer = chat(server, seed=seed, response_format={"type": "json_object"})
        if answer.json["choices"][0]["finish_reason"] == "stop":
            texts.append(content(answer))
    assert texts
    assert all(isinstance(json.loads(text), dict) for text in texts)


def test_a_stream_is_the_whole_and_samples_differ(server):
    fields = {"response_format": JSON_SCHEMA, "n": 3, "logprobs": True, "top_logprobs": 1}
    choices = chat(server, **fields).json["choices"]
    whole = [choice["message"]["content"] for choice in choices]
    for choice, text in zip(choices, whole, strict=True):
        check(text)
        tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
        assert "".join(tokens) == text
    assert len(set(whole)) == 3
    streamed = ["", "", ""]
    for event in chat(server, stream=True, **fields).events[:-1]:
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert streamed == whole


def test_a_cut_answer_says_so(server):
    answer = chat(server, response_format=JSON_SCHEMA, max_tokens=3)
    assert answer.json["choices"][0]["finish_reason"] == "length"


class Weather(pydantic.BaseModel):
    """What the model is to say."""

    city: str = pydantic.Field(max_length=4)
    sky: Literal["clear", "grey"]
    degrees: list[int] = pydantic.Field(max_length=2)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_openai_client_parses(client):
    messages = [{"role": "user", "content": "weather?"}]
    parsed = client.chat.completions.parse(
        model="hermes", messages=messages, response_format=Weather, max_tokens=900, seed=3
    )
    assert isinstance(parsed.choices[0].message.parsed, Weather)
    with client.chat.completions.stream(
        model="hermes", messages=messages, response_format=Weather, max_tokens=900, seed=3
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == (
            parsed.choices[0].message.parsed
        )


def test_responses_parse(client):
    parsed = client.responses.parse(model="hermes", input="weather?", text_format=Weather)
    assert isinstance(parsed.output_parsed, Weather)
    assert parsed.text.format.name == "Weather"
    with pytest.raises(openai.BadRequestError, match=r"text\.format") as caught:
        client.responses.create(
            model="hermes",
            input="x",
            text={"format": {"type": "json_schema", "name": "n", "schema": {"not": {}}}},
        )
    assert caught.value.param == "text.format"


def calls(answer):
    message = answer.json["choices"][0]["message"]
    assert answer.json["choices"][0]["finish_reason"] == "tool_calls"
    assert not message.get("content")
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message["tool_calls"]
    ]


@pytest.mark.parametrize("style", STYLES)
def test_forced_calls(server, style):
    """In the form that the model was trained on, with arguments that its schema allows."""
    counts, names = set(), set()
    for seed in range(8):
        many = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 1500}
        made = calls(chat(server, style, seed=seed, **many))
        counts.add(len(made))
        for name, arguments in made:
            names.add(name)
            if name == "halt":
                assert arguments == {}
            else:
                jsonschema.validate(arguments, SCHEMA)
        named = {"type": "function", "function": {"name": "halt"}}
        one = chat(
            server, style, tools=TOOLS, tool_choice=named, parallel_tool_calls=False, seed=seed
        )
        assert calls(one) == [("halt", {})]
    assert names == {"get_weather", "halt"}
    assert max(counts) > 1 or style == "llama3_json"


def test_forced_calls_in_a_stream(server):
    fields = {"tools": TOOLS, "tool_choice": "required", "seed": 4}
    whole = calls(chat(server, **fields))
    arguments: dict[int, str] = {}
    names = {}
    for event in chat(server, stream=True, **fields).events[:-1]:
        for call in event["choices"][0]["delta"].get("tool_calls") or ():
            names.setdefault(call["index"], call["function"].get("name"))
            arguments.setdefault(call["index"], "")
            arguments[call["index"]] += call["function"].get("arguments") or ""
    assert [(names[i], json.loads(arguments[i])) for i in sorted(names)] == whole


def test_python_arguments_of_every_kind(server):
    schema = {
        "type": "object",
        "properties": {
            "flag": {"type": "boolean"},
            "names": {
                "type": "array",
                "items": {"enum": ["a'b", "c"]},
                "minItems": 1,
                "maxItems": 2,
            },
            "where": {
                "type": "object",
                "properties": {
                    "x": {"type": "integer", "maximum": 9, "minimum": 0},
                    "y": {"const": None},
                },
                "required": ["y"],
            },
            "maybe": {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 5, "maximum": 7}]},
        },
        "required": ["names"],
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    seen = set()
    for seed in range(12):
        ((_, arguments),) = calls(
            chat(
                server,
                "pythonic",
                tools=tools,
                tool_choice="required",
                parallel_tool_calls=False,
                seed=seed,
            )
        )
        jsonschema.validate(arguments, schema)
        seen |= set(arguments)
    assert seen == set(schema["properties"])


def test_the_older_form_of_a_forced_call(server):
    function = {"name": "get_weather", "parameters": PARAMETERS}
    answer = chat(server, functions=[function], function_call={"name": "get_weather"})
    call = answer.json["choices"][0]["message"]["function_call"]
    jsonschema.validate(json.loads(call["arguments"]), PARAMETERS)


def test_a_json_answer_or_a_call(server):
    """Agents give tools and the form of their last answer together."""
    kinds = set()
    for seed in range(12):
        answer = chat(server, tools=TOOLS, response_format=JSON_SCHEMA, seed=seed)
        message = answer.json["choices"][0]["message"]
        if message.get("tool_calls"):
            kinds.add("call")
        else:
            check(message["content"])
            kinds.add("answer")
    assert kinds == {"call", "answer"}


def test_calls_that_are_forced_come_before_the_format_of_text(server):
    """Instructor asks for both; OpenAI gives the call."""
    body = {"model": "hermes", "messages": [{"role": "user", "content": "x"}], "max_tokens": 300}
    body |= {"tools": TOOLS, "tool_choice": "required", "response_format": JSON_SCHEMA}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status == 200, answer.body
    assert answer.json["choices"][0]["message"]["tool_calls"]


def test_anthropic_tool_choice(server):
    import anthropic

    tools = [{"name": "get_weather", "input_schema": SCHEMA}, {"name": "halt", "input_schema": {}}]
    ask = {"model": "hermes", "max_tokens": 300, "messages": [{"role": "user", "content": "x"}]}
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as api:
        any_of = api.messages.create(**ask, tools=tools, tool_choice={"type": "any"})
        assert any_of.stop_reason == "tool_use"
        assert all(block.type == "tool_use" for block in any_of.content)
        choice = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
        (block,) = api.messages.create(**ask, tools=tools, tool_choice=choice).content
        jsonschema.validate(block.input, SCHEMA)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "needs tools"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": TOOLS},
            "tool_choice",
            "no tool 'f'",
        ),
        (
            {"tool_choice": "required", "tools": TOOLS, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "leave structured_outputs out",
        ),
        (
            {
                "tool_choice": "required",
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}
                ],
            },
            "tool_choice",
            '"not"',
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format",
            '"not"',
        ),
    ],
)
def test_what_is_refused_before_a_stream_opens(server, fields, param, message):
    body = {"model": "hermes", "messages": [{"role": "user", "content": "x"}], "stream": True}
    answer = server.post("/v1/chat/completions", {**body, **fields})
    assert answer.status == 400
    assert answer.error["param"] == param
    assert message in answer.error["message"]


def test_restrictions_without_a_grammar(server, tokenizer):
    ids = [*tokenizer.encode("h"), *tokenizer.encode("o")]
    assert set(complete(server, allowed_token_ids=ids, max_tokens=20)["text"]) == {"h", "o"}
    chosen = complete(server, allowed_token_ids=ids, bad_words=["h"], max_tokens=20)
    assert set(chosen["text"]) == {"o"}
    long = complete(server, min_tokens=25, return_token_ids=True, max_tokens=200)
    assert len(long["token_ids"]) > 25


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A model that may think before it answers; the tags are tokens."""
    folder = write_byte_level(tmp_path_factory.mktemp("thinker"), THINKING)
    data = json.loads((folder / "tokenizer.json").read_text())
    for token in data["added_tokens"]:
        if token["content"] in ("a b", "日本"):
            token["content"] = {"a b": "<think>", "日本": "</think>"}[token["content"]]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    engine = fake_engine(Tokenizer.load(folder))
    engine.script = masked_answers(engine)
    with running_server(engine) as client:
        yield client


def test_thoughts_are_free_and_the_answer_is_not(thinker):
    kinds = set()
    for seed in range(25):
        body = {
            "model": "planner",
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": 220,
            "seed": seed,
            "structured_outputs": {"choice": ["good", "bad"]},
        }
        choice = thinker.post("/v1/chat/completions", body).json["choices"][0]
        thought = bool(choice["message"].get("reasoning_content"))
        if choice["finish_reason"] == "stop":
            assert choice["message"]["content"] in ("good", "bad")
            kinds.add(thought)
    assert False in kinds
