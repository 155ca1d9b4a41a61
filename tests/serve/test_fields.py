"""What clients really put into their requests."""

import json

import pytest

from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import eventually, running_server
from tests.serve.test_completions import script

BOTH = pytest.mark.parametrize("kind", ["complete", "chat"])


@BOTH
def test_unknown_fields_are_ignored_and_said(client, kind, caplog):
    for _ in range(2):
        answer = getattr(client, kind)(temprature=1, guidance=None, **{"a\r\nb": 2})
        assert answer.status == 200
        assert answer.headers["Warnings"] == r"unknown fields ignored: temprature, a\r\nb"
    logged = [r.message for r in caplog.records if "unknown fields" in r.message]
    assert logged == [r"unknown fields ignored: temprature, a\r\nb"]
    assert "Warnings" not in getattr(client, kind)().headers


def test_unknown_options_of_a_stream_are_ignored_too(client):
    answer = client.chat(stream=True, stream_options={"include_usage": True, "detail": 1})
    assert answer.headers["Warnings"] == "unknown fields ignored: stream_options.detail"


def test_a_strict_server_refuses_them(tokenizer):
    with running_server(fake_engine(tokenizer, fake_config(strict=True))) as client:
        error = client.complete(temprature=1).error
        assert (error["param"], error["code"]) == ("temprature", "unknown_field")
        assert client.complete(temprature=None, guided_json=None, audio=None).status == 200


def test_null_is_absent(client):
    fields = {"audio": None, "prediction": None, "functions": [], "min_tokens": 0}
    answer = client.chat(
        **fields, tools=None, tool_choice=None, stop=None, logit_bias=None, response_format=None
    )
    assert answer.status == 200
    assert "Warnings" not in answer.headers


@BOTH
def test_whole_numbers_may_have_a_point(client, kind):
    answer = getattr(client, kind)(max_tokens=4.0, n=2.0, top_k=5.0, seed=7.0)
    assert answer.status == 200
    params = client.engine.submitted[-1].params
    assert (params.max_tokens, params.top_k, params.seed) == (4, 5, 8)
    assert type(params.max_tokens) is int


def test_numbers_of_thousands_of_digits(client):
    for digits in (4300, 4301, 100_000):
        body = b'{"model": "planner", "prompt": "x", "max_tokens": ' + b"9" * digits + b"}"
        answer = client.post("/v1/completions", body)
        assert answer.status == 400, answer.body
        assert len(answer.error["message"]) < 400


def test_no_logprobs_and_no_alternatives(client):
    answer = client.chat(logprobs=False, top_logprobs=0)
    assert answer.status == 200
    assert answer.json["choices"][0]["logprobs"] is None


@BOTH
def test_usage_in_every_chunk(client, kind):
    script(client.engine, "hello world", end=False)
    for options in (
        {"continuous_usage_stats": True, "include_usage": True},
        {"continuous_usage_stats": True},
    ):
        *chunks, done = getattr(client, kind)(
            stream=True, stream_options=options, max_tokens=4
        ).events
        assert done == "[DONE]"
        counts = [c["usage"]["completion_tokens"] for c in chunks]
        assert counts == sorted(counts)
        assert counts[-1] == 4
        assert all(c["usage"]["prompt_tokens"] > 0 for c in chunks)


def test_special_tokens_of_the_tokenizer(client, monkeypatch):
    calls = []
    encode = type(client.engine.tokenizer).encode

    def spy(self, text, add_special_tokens=True):
        calls.append(add_special_tokens)
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(type(client.engine.tokenizer), "encode", spy)
    for given in (None, True, False):
        client.complete(add_special_tokens=given)
        client.chat(add_special_tokens=given)
    assert calls == [True, False, True, True, False, False]


@BOTH
def test_prompts_are_truncated_from_the_left(client, kind):
    getattr(client, kind)("hello there you")
    whole = client.engine.submitted[-1].prompt_token_ids
    answer = getattr(client, kind)("hello there you", truncate_prompt_tokens=3)
    assert client.engine.submitted[-1].prompt_token_ids == whole[-3:]
    assert answer.json["usage"]["prompt_tokens"] == 3
    assert getattr(client, kind)("x" * 5000, truncate_prompt_tokens=-1).status == 200
    assert len(client.engine.submitted[-1].prompt_token_ids) == 255


def test_truncated_token_ids_and_their_echo(client):
    answer = client.complete([5, 6, 7, 8], truncate_prompt_tokens=2, echo=True)
    assert client.engine.submitted[-1].prompt_token_ids == (7, 8)
    text = client.engine.tokenizer.decode([7, 8])
    assert answer.json["choices"][0]["text"] == text + "hello world"


def test_prompt_token_ids_are_returned_for_each_choice(client):
    body = client.complete([[5, 6], [7, 8]], n=2, return_token_ids=True).json
    assert [c["prompt_token_ids"] for c in body["choices"]] == [[5, 6], [5, 6], [7, 8], [7, 8]]
    *chunks, _ = client.complete([5, 6], return_token_ids=True, stream=True).events
    assert chunks[0]["choices"][0]["prompt_token_ids"] == [5, 6]
    assert not any("prompt_token_ids" in c["choices"][0] for c in chunks[1:])


@pytest.mark.parametrize("tokens_per_event", [1, 3, 100])
def test_a_stream_lists_the_tokens_of_the_whole_answer(client, tokens_per_event):
    """Tokens without text may belong to a stop string that is not there yet."""
    tokenizer = client.engine.tokenizer
    ids = [*tokenizer.encode("hello"), 0, 1, *tokenizer.encode("\nuser and more")]
    client.engine.script = lambda request: list(ids)
    client.engine.tokens_per_event = tokens_per_event
    for stop in ("\nuser", "🙂", "er"):
        fields = {"stop": stop, "ignore_eos": True, "logprobs": True, "max_tokens": len(ids)}
        whole = client.chat(**fields).json["choices"][0]
        *chunks, _ = client.chat(**fields, stream=True).events
        choices = [chunk["choices"][0] for chunk in chunks]
        streamed = [t for c in choices if c["logprobs"] for t in c["logprobs"]["content"]]
        assert streamed == whole["logprobs"]["content"]
        assert (
            "".join(c["delta"].get("content", "") for c in choices) == (whole["message"]["content"])
        )


def test_a_stream_that_waits_says_that_it_lives(tokenizer):
    engine = fake_engine(tokenizer, fake_config(ping_seconds=0.02))
    engine.gate.clear()
    body = {"model": "planner", "prompt": "x", "stream": True}
    with running_server(engine) as client, client.raw_request("/v1/completions", body) as sock:
        received = b""
        while received.count(b": ping\n\n") < 3:
            received += sock.recv(4096)
        engine.gate.set()
        while b"[DONE]" not in received:
            received += sock.recv(4096)
        assert b'"text":"h' in received


def test_pings_can_be_off(tokenizer):
    engine = fake_engine(tokenizer, fake_config(ping_seconds=0))
    with running_server(engine) as client:
        assert client.complete(stream=True).events[-1] == "[DONE]"


def test_lengths_of_aborted_requests_are_counted(client):
    client.engine.gate.clear()
    with client.raw_request("/v1/completions", {"model": "planner", "prompt": [5] * 32}):
        eventually(lambda: client.engine.running_ids != [])
    labels = {"model_name": "planner"}
    eventually(lambda: client.metric("vllm:request_prompt_tokens_sum", **labels) == 32)
    assert client.metric("vllm:prompt_tokens_total", **labels) == 32
    assert client.metric("vllm:e2e_request_latency_seconds_count", **labels) == 0


def test_a_body_of_spaces_and_an_escaped_name(client):
    body = b' \n{"mod\\u0065l": "planner", "prompt": "x"}\r\n'
    assert client.post("/v1/completions", body).status == 200
    assert json.loads(body)["model"] == "planner"
