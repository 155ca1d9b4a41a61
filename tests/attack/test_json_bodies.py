"""Arbitrary JSON at the endpoints: never a 5xx, and the server goes on."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pshare_jax.frontend.messages_api import MessagesRequest
from pshare_jax.frontend.requests import ChatRequest, CompletionRequest
from pshare_jax.frontend.responses_api import ResponsesRequest
from tests.attack.bounds import SEEDS
from tests.serve.fake import fake_engine
from tests.serve.server import running_server

ODD = [
    0, -1, 1, 2, 17, 407, 408, 2**31, 2**63, -(2**63) - 1, 2**64, 10**40,
    0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"),
    "", "x", "5", "text", "user", "planner", "\ud800", "\x00", "é🙂", "auto",
    None, True, False, [], {}, [[]], [{}], [1], [[1]], ["x"], [1, "x"], {"1": 1}, {"type": "text"},
]  # fmt: skip
scalars = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "tool"]) | values,
            "content": st.text(max_size=5) | values,
            "tool_calls": values,
            "name": values,
        },
    ),
    max_size=3,
)


def bodies(kind: type, **known: st.SearchStrategy) -> st.SearchStrategy:
    """Mostly valid requests with a few fields replaced by anything."""
    names = st.sampled_from([*kind.__struct_fields__, "surprise"])
    strange = st.dictionaries(names, values, max_size=3)
    valid = st.fixed_dictionaries({"model": st.just("planner") | values, **known})
    return st.builds(lambda a, b: {**a, **b}, valid, strange) | values


@pytest.fixture(scope="module")
def server(tokenizer):
    with running_server(fake_engine(tokenizer)) as client:
        yield client


quick = settings(
    max_examples=80 * len(SEEDS),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)


def check(server, path: str, body: object) -> None:
    answer = server.post(path, json.dumps(body).encode("utf-8", "surrogatepass"))
    assert answer.status == 200 or 400 <= answer.status < 500, (body, answer.body)
    if answer.status != 200:
        assert answer.error["type"] == "invalid_request_error"
    elif isinstance(body, dict) and body.get("stream"):
        assert answer.events[-1] == "[DONE]"
    else:
        assert answer.json["usage"]["total_tokens"] > 0
    assert server.engine.dead is None


@quick
@given(body=bodies(CompletionRequest, prompt=st.text(max_size=8) | values))
def test_completions_never_fail(server, body):
    check(server, "/v1/completions", body)


@quick
@given(body=bodies(ChatRequest, messages=messages | values))
def test_chat_never_fails(server, body):
    check(server, "/v1/chat/completions", body)


blocks = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(
                ["text", "input_text", "tool_use", "tool_result", "thinking", "function_call",
                 "function_call_output", "reasoning", "message"]
            ) | values,
            **{
                name: st.text(max_size=4) | values
                for name in ("text", "id", "name", "input", "content", "thinking", "arguments",
                             "call_id", "tool_use_id", "output", "role", "summary")
            },
        },
    ),
    max_size=3,
)  # fmt: skip
odd_tools = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["function", "custom", "web_search"]) | values,
            "name": st.text(max_size=4) | values,
            "parameters": values,
            "input_schema": values,
            "description": values,
            "function": st.fixed_dictionaries({"name": st.text(max_size=4)}) | values,
        },
    ),
    max_size=2,
)


@quick
@given(body=bodies(ChatRequest, messages=messages, tools=odd_tools))
def test_tools_never_fail(server, body):
    check(server, "/v1/chat/completions", body)


@quick
@given(body=bodies(ResponsesRequest, input=st.text(max_size=5) | blocks | values, tools=odd_tools))
def test_responses_never_fail(server, body):
    answer = server.post("/v1/responses", json.dumps(body).encode("utf-8", "surrogatepass"))
    assert answer.status == 200 or 400 <= answer.status < 500, (body, answer.body)


turns = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=5) | blocks}
    ),
    min_size=1,
    max_size=3,
)


@quick
@given(body=bodies(MessagesRequest, messages=turns, max_tokens=st.integers(1, 9), tools=odd_tools))
def test_messages_never_fail(server, body):
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        answer = server.post(path, json.dumps(body).encode("utf-8", "surrogatepass"))
        assert answer.status == 200 or 400 <= answer.status < 500, (body, answer.body)
        if answer.status != 200:
            assert answer.json["error"]["type"] in ("invalid_request_error", "not_found_error")


@quick
@given(body=st.binary(max_size=30) | st.text(max_size=30).map(lambda t: t.encode()))
def test_bytes_never_fail(server, body):
    answer = server.post("/v1/completions", body)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"


def test_the_server_still_answers(server):
    assert server.complete().json["choices"][0]["text"] == "hello world"
    assert server.chat().json["choices"][0]["message"]["content"] == "hello world"
    assert server.engine.running_ids == []
    assert server.metric("vllm:request_success_total", finished_reason="error") == 0
