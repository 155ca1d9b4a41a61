"""The Responses API, with the real client."""

import openai
import pytest

from pshare_jax.text.tokenizer import Tokenizer
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import running_server
from tests.serve.test_completions import script
from tests.serve.test_tools import ARGUMENTS, CALL, NOOP, TEMPLATE
from tests.text.tiny import write_byte_level

TOOLS = [
    {
        "type": "function",
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": False,
    },
    {"type": "function", "name": "noop", "parameters": {"type": "object"}},
]
WHOLE = f"<think>\nhmm\n</think>\n\nI look.\n{CALL}\n{NOOP}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    tokenizer = Tokenizer.load(write_byte_level(tmp_path_factory.mktemp("responses"), TEMPLATE))
    with running_server(fake_engine(tokenizer, fake_config(max_model_len=2048))) as client:
        yield client


@pytest.fixture
def api(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as api:
        yield api.responses


def prompt_text(server) -> str:
    return server.engine.tokenizer.decode(server.engine.submitted[-1].prompt_token_ids)


def test_text(server, api):
    script(server.engine, "hello world")
    response = api.create(
        model="planner", input="hi", instructions="Be kind.", temperature=0.5, max_output_tokens=50
    )
    assert response.output_text == "hello world"
    assert (response.status, response.object, response.model) == (
        "completed",
        "response",
        "planner",
    )
    assert response.usage.total_tokens == (
        response.usage.input_tokens + response.usage.output_tokens
    )
    assert response.usage.input_tokens_details.cached_tokens == 0
    assert prompt_text(server) == "[system]Be kind.[user]hi"
    assert server.engine.submitted[-1].params.temperature == 0.5
    assert server.engine.submitted[-1].params.max_tokens == 50


def test_thoughts_text_and_calls_are_items(server, api):
    script(server.engine, WHOLE)
    response = api.create(model="planner", input="weather?", tools=TOOLS)
    assert [item.type for item in response.output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    thoughts, message, weather, noop = response.output
    assert thoughts.content[0].text == "hmm"
    assert message.content[0].text == "I look."
    assert (weather.name, weather.arguments) == ("get_weather", ARGUMENTS)
    assert (noop.name, noop.arguments) == ("noop", "{}")
    assert weather.call_id != weather.id
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    # All of it goes back as it is, with a result.
    result = {"type": "function_call_output", "call_id": weather.call_id, "output": "sunny"}
    script(server.engine, "Sunny.")
    again = api.create(
        model="planner",
        input=[{"role": "user", "content": "weather?"}, *response.output, result],
        tools=TOOLS,
    )
    assert again.output_text == "Sunny."
    text = prompt_text(server)
    assert text.startswith('[user]weather?[assistant]I look.<tool_call>{"name": "get_weather"')
    assert "[tool]sunny" in text


@pytest.mark.parametrize("tokens_per_event", [1, 5, 1000])
def test_events_tell_the_same(server, api, tokens_per_event):
    script(server.engine, WHOLE)
    server.engine.tokens_per_event = tokens_per_event
    whole = api.create(model="planner", input="weather?", tools=TOOLS)
    events = list(api.create(model="planner", input="weather?", tools=TOOLS, stream=True))
    server.engine.tokens_per_event = 1
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    deltas: dict[tuple[int, str], str] = {}
    for event in events:
        if event.type.endswith(".delta"):
            key = (event.output_index, event.type)
            deltas[key] = deltas.get(key, "") + event.delta
    assert deltas == {
        (0, "response.reasoning_text.delta"): "hmm",
        (1, "response.output_text.delta"): "I look.",
        (2, "response.function_call_arguments.delta"): ARGUMENTS,
        (3, "response.function_call_arguments.delta"): "{}",
    }
    final = events[-1].response
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.model_dump() for item in done] == [item.model_dump() for item in final.output]
    for ours, theirs in zip(final.output, whole.output, strict=True):
        skipped = {"id", "call_id"}
        assert ours.model_dump(exclude=skipped) == theirs.model_dump(exclude=skipped)
    assert final.usage.output_tokens == whole.usage.output_tokens
    added = [e.item.id for e in events if e.type == "response.output_item.added"]
    assert added == [item.id for item in final.output]


def test_the_clients_own_accumulator(server, api):
    script(server.engine, WHOLE)
    with api.stream(model="planner", input="weather?", tools=TOOLS) as stream:
        final = stream.get_final_response()
    assert final.output_text == "I look."
    assert [i.name for i in final.output if i.type == "function_call"] == ["get_weather", "noop"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_off_is_incomplete(server, api, stream):
    script(server.engine, "hello world and more")
    answer = api.create(model="planner", input="hi", max_output_tokens=2, stream=stream)
    response = list(answer)[-1].response if stream else answer
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"


def test_an_empty_answer_has_a_message(server, api):
    script(server.engine, "")
    assert api.create(model="planner", input="hi").output[0].content[0].text == ""


def test_an_engine_that_fails_ends_the_stream_so(tmp_path):
    engine = fake_engine(Tokenizer.load(write_byte_level(tmp_path)))
    engine.gate.clear()
    with (
        running_server(engine) as client,
        client.raw_request(
            "/v1/responses", {"model": "planner", "input": "x", "stream": True}
        ) as sock,
    ):
        received = b""
        while b"\r\n\r\n" not in received:
            received += sock.recv(4096)
        engine.fail("no memory")
        while not received.endswith(b"\r\n0\r\n\r\n"):
            received += sock.recv(4096)
    assert b"event: response.failed\n" in received
    assert b"no memory" in received


def test_tools_of_openais_servers_are_ignored_and_said(server):
    script(server.engine, "hello")
    body = {"model": "planner", "input": "x", "tools": [{"type": "web_search"}]}
    answer = server.post("/v1/responses", body)
    assert answer.headers["Warnings"] == "tools ignored: web_search"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored"),
        ({"conversation": "c"}, "conversation", "nothing is stored"),
        ({"background": True}, "background", "nothing is stored"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "is missing"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type", "must be text, json_object"),
        ({"text": {"format": "json"}}, "text.format", "must be an object"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"input": []}, "messages", "at least one message"),
        ({"input": 5}, "input", "got 'int'"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "'item_reference'"),
        ({"input": [{"role": "pope", "content": "x"}]}, "input[0]", "'pope'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
            "only text is",
        ),
        ({"input": [{"type": "function_call", "name": 5}]}, "input[0].name", "must be a string"),
        ({"model": "nobody"}, "model", "does not exist"),
        ({"max_output_tokens": 0}, "max_tokens", "at least 1"),
    ],
)
def test_what_is_refused(server, fields, param, message):
    answer = server.post("/v1/responses", {"model": "planner", "input": "x", **fields})
    assert answer.status in (400, 404)
    assert answer.error["param"] == param
    assert message in answer.error["message"]
