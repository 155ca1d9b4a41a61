"""`/v1/fanout`: several models over one context, their answers apart, their errors too."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from pshare_jax.core.requests import FinishReason, RequestOutput, Session
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import Answer, Client, eventually, running_server

ALL = ["planner", "coder", "team/critic"]
TEXT = "hello there, this is a context of some length"


def fan_out(client: Client, models: Any = ALL, **fields: Any) -> Answer:
    body = {"model": models, "messages": [{"role": "user", "content": TEXT}], **fields}
    return client.post("/v1/fanout", body)


def fail(client: Client, model: str) -> None:
    """The engine gives up the sequence of one model."""
    engine = client.engine
    eventually(lambda: len(engine.running_ids) == 3)
    with engine._lock:
        [running] = [r for r in engine._running.values() if r.request.model == model]
        del engine._running[running.request.id]
        id = running.request.id
        running.sink(RequestOutput(id, finish_reason=FinishReason.ERROR, error="out of luck"))
    engine.gate.set()


def streamed(answer: Answer, model: str) -> str:
    """The text that a stream has of one model."""
    chunks = [e for e in answer.events[:-1] if e.get("model") == model and e.get("choices")]
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)


def test_every_model_answers_over_one_context_which_is_computed_once(client: Client) -> None:
    answer = fan_out(client, session_id="s", ttl=3)
    assert answer.status == 200
    body = answer.json
    assert body["object"] == "fanout"
    assert [part["model"] for part in body["answers"]] == ALL
    texts = {part["choices"][0]["message"]["content"] for part in body["answers"]}
    assert texts == {"hello world"}
    submitted = client.engine.submitted
    assert len({request.prompt_token_ids for request in submitted}) == 1
    assert {request.session for request in submitted} == {Session("s", 3.0)}
    cached = [p["usage"]["prompt_tokens_details"]["cached_tokens"] for p in body["answers"]]
    assert sorted(count > 0 for count in cached) == [False, False, True], "one of them is isolated"
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert body["usage"][key] == sum(part["usage"][key] for part in body["answers"])
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == sum(cached)
    assert answer.headers["X-Request-Id"] == body["id"]


def test_a_stream_has_chunks_of_every_model_and_one_end(client: Client) -> None:
    answer = fan_out(client, stream=True, stream_options={"include_usage": True})
    events = answer.events
    assert events[-1] == "[DONE]"
    assert events.count("[DONE]") == 1
    assert {model: streamed(answer, model) for model in ALL} == dict.fromkeys(ALL, "hello world")
    total = events[-2]
    assert (total["object"], total["answers"]) == ("fanout.usage", [])
    parts = [e["usage"] for e in events[:-2] if e["choices"] == []]
    assert len(parts) == 3
    assert total["usage"]["total_tokens"] == sum(usage["total_tokens"] for usage in parts)
    assert "usage" not in fan_out(client, stream=True).events[0]


def test_a_model_that_is_not_served_is_an_entry_among_the_others(client: Client) -> None:
    models = ["planner", "plumber"]
    first, second = fan_out(client, models).json["answers"]
    assert first["choices"][0]["finish_reason"] == "stop"
    assert (second["model"], second["error"]["code"]) == ("plumber", "model_not_found")
    answer = fan_out(client, models, stream=True)
    assert streamed(answer, "planner") == "hello world"
    [error] = [e for e in answer.events[:-1] if "error" in e]
    assert (error["model"], error["error"]["code"]) == ("plumber", "model_not_found")


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_fails_meanwhile_does_not_end_the_others(tokenizer, stream: bool) -> None:
    engine = fake_engine(tokenizer)
    engine.gate.clear()
    with running_server(engine) as client:
        thread = threading.Thread(target=fail, args=(client, "coder"))
        thread.start()
        answer = fan_out(client, stream=stream)
        thread.join()
        assert answer.status == 200
        parts = answer.events[:-1] if stream else answer.json["answers"]
        [error] = [part for part in parts if "error" in part]
        assert error["model"] == "coder"
        assert error["error"]["message"] == "out of luck"
        if stream:
            assert answer.events[-1] == "[DONE]"
            texts = [streamed(answer, model) for model in ("planner", "team/critic")]
        else:
            texts = [p["choices"][0]["message"]["content"] for p in parts if "choices" in p]
        assert texts == ["hello world"] * 2


def test_a_queue_that_is_full_for_some_is_an_entry_too(tokenizer) -> None:
    engine = fake_engine(tokenizer, fake_config(max_queue=1))
    with running_server(engine) as client:
        parts = fan_out(client).json["answers"]
        codes = sorted(part["error"]["code"] for part in parts if "error" in part)
        assert len(parts) == 3
        assert set(codes) <= {"rate_limit_exceeded"}
        assert any("choices" in part for part in parts)


@pytest.mark.parametrize(
    ("models", "fields", "status", "param", "says"),
    [
        ([], {}, 400, "model", "1 .. 2 models (server.max_fanout), got 0"),
        (ALL, {}, 400, "model", "got 3"),
        (["planner", "planner"], {}, 400, "model", "'planner' more than once"),
        ("planner", {}, 400, "model", "Expected 'array', got 'str'"),
        (["plumber"], {}, 404, "model", "'plumber' does not exist"),
        (["planner"], {"messages": []}, 400, "messages", "at least one message"),
        (["planner", "coder"], {"n": 60}, 400, "n", "2 models with n = 60 are 120 sequences"),
        (["planner"], {"session_id": "x" * 300}, 400, "session_id", "256"),
    ],
)
def test_what_cannot_be_is_refused_as_a_whole(
    tokenizer, models: Any, fields: dict[str, Any], status: int, param: str, says: str
) -> None:
    with running_server(fake_engine(tokenizer, fake_config(max_fanout=2))) as client:
        answer = fan_out(client, models, **fields)
        assert (answer.status, answer.error["param"]) == (status, param)
        assert says in answer.error["message"]
        assert client.engine.submitted == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_all_models(tokenizer, stream: bool) -> None:
    engine = fake_engine(tokenizer)
    engine.gate.clear()
    body = {"model": ALL, "stream": stream, "messages": [{"role": "user", "content": TEXT}]}
    with running_server(engine) as client:
        with client.raw_request("/v1/fanout", body):
            eventually(lambda: len(engine.running_ids) == 3)
        eventually(lambda: not engine.running_ids)
        assert len(engine.aborted) == 3
        assert engine.completed == []


def test_it_is_json_and_has_tools_and_samples_of_each_model(client: Client) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    answer = fan_out(client, ["planner", "coder"], n=2, tools=[tool])
    assert answer.headers["Content-Type"].startswith("application/json")
    assert [len(part["choices"]) for part in json.loads(answer.body)["answers"]] == [2, 2]
