"""Every way to ask wrongly gets a 4xx that says what was wrong, and nobody else is hurt."""

import json

import pytest

from pshare_jax.errors import QueueFullError, RequestError
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import eventually, running_server

BOTH = "both"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "x"}
LIMIT = 256

BAD_FIELDS = [
    # (endpoint, fields, status, param, part of the message)
    (BOTH, {"model": "nobody"}, 404, "model", "'nobody' does not exist; served: planner"),
    (BOTH, {"model": 5}, 400, "model", "Expected 'str', got 'int'"),
    (BOTH, {"model": None}, 400, "model", "got 'null'"),
    (BOTH, {"temprature": 1}, 400, "temprature", "Unrecognized request argument supplied: tempr"),
    (BOTH, {"temperature": -0.1}, 400, "temperature", "between 0 and 100, got -0.1"),
    (BOTH, {"temperature": 1e308}, 400, "temperature", "between 0 and 100"),
    (BOTH, {"temperature": "hot"}, 400, "temperature", "got 'str'"),
    (BOTH, {"temperature": True}, 400, "temperature", "got 'bool'"),
    (BOTH, {"temperature": 10**400}, 400, None, ""),
    (BOTH, {"top_p": 0}, 400, "top_p", "above 0"),
    (BOTH, {"top_p": 1.01}, 400, "top_p", "between 0 and 1"),
    (BOTH, {"top_p": -1}, 400, "top_p", "between 0 and 1"),
    (BOTH, {"min_p": 2}, 400, "min_p", "between 0 and 1"),
    (BOTH, {"top_k": -2}, 400, "top_k", "between -1 and"),
    (BOTH, {"top_k": 2**63}, 400, "top_k", "between -1 and"),
    (BOTH, {"top_k": 1.5}, 400, "top_k", "got 'float'"),
    (BOTH, {"seed": 2**63}, 400, "seed", "between"),
    (BOTH, {"seed": 10**100}, 400, "seed", "a number of 101 digits"),
    (BOTH, {"seed": "1"}, 400, "seed", "got 'str'"),
    (BOTH, {"n": 0}, 400, "n", "between 1 and 128, got 0"),
    (BOTH, {"n": 129}, 400, "n", "between 1 and 128, got 129"),
    (BOTH, {"n": -(2**70)}, 400, "n", "between 1 and 128"),
    (BOTH, {"max_tokens": 0}, 400, "max_tokens", "at least 1, got 0"),
    (BOTH, {"max_tokens": -5}, 400, "max_tokens", "at least 1, got -5"),
    (BOTH, {"max_tokens": 10**30}, 400, None, "maximum context length is 256 tokens"),
    (BOTH, {"presence_penalty": 2.1}, 400, "presence_penalty", "between -2 and 2"),
    (BOTH, {"frequency_penalty": -3}, 400, "frequency_penalty", "between -2 and 2"),
    (BOTH, {"repetition_penalty": 0}, 400, "repetition_penalty", "between 0.01 and 100"),
    (BOTH, {"logit_bias": {"5": 101}}, 400, "logit_bias", "between -100 and 100"),
    (BOTH, {"logit_bias": {"408": 1}}, 400, "logit_bias", "token id 408 is out of range"),
    (BOTH, {"logit_bias": {"-1": 1}}, 400, "logit_bias", "not a token id"),
    (BOTH, {"logit_bias": {"٣": 1}}, 400, "logit_bias", "not a token id"),
    (BOTH, {"logit_bias": {"9" * 5000: 1}}, 400, "logit_bias", "not a token id"),
    (BOTH, {"logit_bias": {str(i): 1 for i in range(301)}}, 400, "logit_bias", "at most 300"),
    (BOTH, {"logit_bias": [1]}, 400, "logit_bias", "got 'array'"),
    (BOTH, {"stop": ""}, 400, "stop", "1 to 1000 characters"),
    (BOTH, {"stop": ["a", ""]}, 400, "stop", "1 to 1000 characters"),
    (BOTH, {"stop": "x" * 1001}, 400, "stop", "1 to 1000 characters"),
    (BOTH, {"stop": ["x"] * 17}, 400, "stop", "at most 16"),
    (BOTH, {"stop": 5}, 400, "stop", "got 'int'"),
    (BOTH, {"stop_token_ids": [408]}, 400, "stop_token_ids", "out of range"),
    (BOTH, {"stop_token_ids": [1] * 257}, 400, "stop_token_ids", "at most 256"),
    (BOTH, {"stream": "yes"}, 400, "stream", "got 'str'"),
    (BOTH, {"stream_options": {"include_usage": True}}, 400, "stream_options", "stream: true"),
    (
        BOTH,
        {"stream": True, "stream_options": {"usage": True}},
        400,
        "stream_options.usage",
        "Unrecognized",
    ),
    (BOTH, {"cache_salt": "x" * 257}, 400, "cache_salt", "at most 256"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", "at least one token"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", "empty list"),
    (COMPLETIONS, {"prompt": [[]]}, 400, "prompt", "at least one token"),
    (COMPLETIONS, {"prompt": ["a", ""]}, 400, "prompt", "at least one token"),
    (COMPLETIONS, {"prompt": ["a", 1]}, 400, "prompt", "only strings, only token ids"),
    (COMPLETIONS, {"prompt": [[1], 1]}, 400, "prompt", "only strings, only token ids"),
    (COMPLETIONS, {"prompt": [1, True]}, 400, "prompt[1]", "got 'bool'"),
    (COMPLETIONS, {"prompt": [1, 2.5]}, 400, "prompt[1]", "got 'float'"),
    (COMPLETIONS, {"prompt": None}, 400, "prompt", "got 'null'"),
    (COMPLETIONS, {"prompt": {"a": 1}}, 400, "prompt", "got 'object'"),
    (COMPLETIONS, {"prompt": [0, 408]}, 400, "prompt", "token id 408 is out of range"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt", "token id -1 is out of range"),
    (COMPLETIONS, {"prompt": [2**80]}, 400, "prompt", "is out of range"),
    (COMPLETIONS, {"prompt": [5] * 256}, 400, "prompt", "requested 257 tokens (256 in the prompt"),
    (COMPLETIONS, {"prompt": [5] * 250, "max_tokens": 7}, 400, "prompt", "requested 257 tokens"),
    (COMPLETIONS, {"prompt": "x" * 100_000}, 400, "prompt", "maximum context length"),
    (COMPLETIONS, {"logprobs": 21}, 400, "logprobs", "between 0 and 20"),
    (COMPLETIONS, {"logprobs": -1}, 400, "logprobs", "between 0 and 20"),
    (COMPLETIONS, {"logprobs": True}, 400, "logprobs", "got 'bool'"),
    (COMPLETIONS, {"echo": True, "logprobs": 1, "stream": True, "n": 2}, 400, "n", "needs n = 1"),
    (COMPLETIONS, {"echo": True, "max_tokens": -1}, 400, "max_tokens", "at least 0"),
    (COMPLETIONS, {"best_of": 3, "n": 4}, 400, "best_of", "at least n (4)"),
    (COMPLETIONS, {"best_of": 3, "stream": True}, 400, "best_of", "cannot be streamed"),
    (COMPLETIONS, {"best_of": 129}, 400, "best_of", "between 1 and 128"),
    (BOTH, {"prompt_logprobs": 21}, 400, "prompt_logprobs", "between 0 and 20"),
    (BOTH, {"prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs", "not served in streams"),
    (COMPLETIONS, {"suffix": "end"}, 400, "suffix", "not served"),
    (COMPLETIONS, {"messages": [USER]}, 400, "messages", "Unrecognized"),
    (CHAT, {"prompt": "x"}, 400, "prompt", "Unrecognized"),
    (CHAT, {"messages": []}, 400, "messages", "at least one message"),
    (CHAT, {"messages": "hi"}, 400, "messages", "got 'str'"),
    (CHAT, {"messages": ["hi"]}, 400, "messages[0]", "got 'str'"),
    (CHAT, {"messages": [{"role": "pope", "content": "x"}]}, 400, "messages[0].role", "'pope'"),
    (CHAT, {"messages": [{"content": "x"}]}, 400, "messages[0].role", "Missing required"),
    (CHAT, {"messages": [USER, {"role": "user"}]}, 400, "messages[1].content", "needs content"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content", "got 'int'"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "messages[0].content[0]",
        "'image_url' is not served",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        400,
        "messages[0].content[0]",
        "'text' field",
    ),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 99_999}]}, 400, "messages", "maximum"),
    (CHAT, {"max_completion_tokens": 300}, 400, "messages", "in the completion"),
    (CHAT, {"max_completion_tokens": 3, "max_tokens": 4}, 400, "max_completion_tokens", "differ"),
    (CHAT, {"top_logprobs": 2}, 400, "top_logprobs", "logprobs: true"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "between 0 and 20"),
    (CHAT, {"logprobs": 1}, 400, "logprobs", "got 'int'"),
    (
        CHAT,
        {"response_format": {"type": "yaml"}},
        400,
        "response_format.type",
        "must be text, json_object or json_schema",
    ),
    (CHAT, {"response_format": "text"}, 400, "response_format", "got 'str'"),
    (CHAT, {"tool_choice": "required"}, 400, "tool_choice", "needs tools"),
    (CHAT, {"tool_choice": {"type": "function"}}, 400, "tool_choice", "or name a function"),
    (CHAT, {"modalities": ["audio"]}, 400, "modalities", "['text']"),
    (CHAT, {"tools": [{"type": "function"}]}, 400, "tools[0]", "not a function tool"),
    (CHAT, {"tools": [{"type": "python", "function": {"name": "f"}}]}, 400, "tools[0]", "python"),
    (CHAT, {"tools": ["f"]}, 400, "tools[0]", "got 'str'"),
    (BOTH, {"max_tokens": 2.5}, 400, "max_tokens", "Expected 'int', got 'float'"),
    (BOTH, {"seed": 1e300}, 400, "seed", "a number of 30"),
    (BOTH, {"truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens", "-1 or between 1 and 255"),
    (BOTH, {"truncate_prompt_tokens": 256}, 400, "truncate_prompt_tokens", "between 1 and 255"),
    (BOTH, {"min_tokens": 8, "max_tokens": 7}, 400, "min_tokens", "must not exceed max_tokens"),
    (BOTH, {"min_tokens": -1}, 400, "min_tokens", "between 0 and"),
    (BOTH, {"allowed_token_ids": []}, 400, "allowed_token_ids", "must not be empty"),
    (BOTH, {"allowed_token_ids": [5000]}, 400, "allowed_token_ids", "out of range"),
    (BOTH, {"bad_words": ["x"] * 257}, 400, "bad_words", "at most 256 words, got 257"),
    (BOTH, {"bad_words": ["x", ""]}, 400, "bad_words", "no empty word"),
    (BOTH, {"guided_json": 5}, 400, "guided_json", "got 'int'"),
    (BOTH, {"guided_choice": []}, 400, "guided_choice", "1 to 1000 texts"),
    (
        BOTH,
        {"guided_regex": "a", "structured_outputs": {"choice": ["b"]}},
        400,
        "guided_regex",
        "not both",
    ),
    (BOTH, {"structured_outputs": {"regex": "a(b"}}, 400, "structured_outputs", "cannot be used"),
    (BOTH, {"guided_json": {"not": {}}}, 400, "guided_json", '"not"'),
    (BOTH, {"guided_json": "[" * 99_999}, 400, "guided_json", "at most 65536"),
    (COMPLETIONS, {"prompt": ["x"] * 257}, 400, "prompt", "257 prompts; the server takes 256"),
    (COMPLETIONS, {"prompt": [[5]] * 257}, 400, "prompt", "257 prompts; the server takes 256"),
    (CHAT, {"messages": [USER] * 257}, 400, "messages", "257 messages; the context has 256"),
    (CHAT, {"tools": [{}] * 1025}, 400, "tools", "at most 1024 tools, got 1025"),
    (
        CHAT,
        {"chat_template_kwargs": {"messages": []}},
        400,
        "chat_template_kwargs",
        "may not set messages",
    ),
    (CHAT, {"chat_template_kwargs": {"mood": 5}}, 400, "messages", "chat template cannot render"),
]


@pytest.fixture(scope="module")
def server(tokenizer):
    config = fake_config(max_model_len=LIMIT, strict=True)
    with running_server(fake_engine(tokenizer, config)) as client:
        yield client


def body_of(path: str, fields: dict) -> dict:
    default = {"prompt": "x"} if path == COMPLETIONS else {"messages": [USER]}
    return {"model": "planner", **default, **fields}


@pytest.mark.parametrize(
    ("where", "fields", "status", "param", "message"), BAD_FIELDS, ids=lambda v: str(v)[:40]
)
def test_a_bad_field_is_named(server, where, fields, status, param, message):
    assert server.engine.model_config.vocab_size == 408
    for path in [COMPLETIONS, CHAT] if where == BOTH else [where]:
        for stream in ([] if "stream" in fields or "stream_options" in fields else [True]) + [None]:
            extra = {"stream": True} if stream else {}
            answer = server.post(path, body_of(path, {**fields, **extra}))
            assert answer.status == status, answer.body
            assert answer.headers["Content-Type"] == "application/json"
            error = answer.error
            assert message in error["message"]
            assert error["type"] == "invalid_request_error"
            if param is not None:
                assert error["param"] == param
    assert server.complete().json["choices"][0]["text"] == "hello world"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"{'model': 'planner'}",
        b'{"model": "planner", "prompt": "x"} trailing',
        b'{"model": "planner", "prompt": "x", "temperature": NaN}',
        b'{"model": "planner", "prompt": "x", "temperature": Infinity}',
        b'{"model": "planner", "prompt": "x", "temperature": -1e999}',
        b'{"model": "planner", "prompt": "x", "temperature": ' + b"9" * 5000 + b"}",
        b'{"model": "planner", "prompt": "\\ud800"}',
        b'{"model": "planner", "prompt": "a\\ud800b"}',
        b'{"model": "planner", "prompt": "\\udc00\\ud800"}',
        b'{"model": "planner", "prompt": "\xff\xfe"}',
        b'{"model": "planner", "prompt": "\xed\xa0\x80"}',
        '{"model": "planner", "prompt": "x"}'.encode("utf-16"),
        b"[" * 200_000,
        b'{"model": "planner", "metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"model": "planner", "prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b"[]",
        b"null",
        b"5",
        b'"planner"',
    ],
    ids=lambda body: repr(body[:60]),
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_malformed_json(server, path, body):
    answer = server.post(path, body)
    assert answer.status == 400, answer.body
    assert answer.error["type"] == "invalid_request_error"
    assert server.complete().status == 200


def test_nul_and_control_characters_are_ordinary_text(server):
    assert server.complete("a\x00b\x1b\u2028").status == 200
    tokenizer = server.engine.tokenizer
    ids = server.engine.submitted[-1].prompt_token_ids
    assert tokenizer.decode(ids) == "a\x00b\x1b\u2028"


def test_deep_tools_are_refused_or_rendered(server):
    depth = 150
    nested = json.loads('{"a":' * depth + "1" + "}" * depth)
    tool = {"type": "function", "function": {"name": "f", "parameters": nested}}
    answer = server.post(CHAT, body_of(CHAT, {"tools": [tool]}))
    assert answer.status == 400
    assert answer.error["param"] == "messages"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_wrong_content_type(server, kind):
    headers = {"Content-Type": kind} if kind else {}
    body = json.dumps(body_of(COMPLETIONS, {})).encode()
    answer = server.request("POST", COMPLETIONS, body, headers)
    assert answer.status == 415
    assert answer.error["code"] == "unsupported_media_type"
    assert "send application/json" in answer.error["message"]


def test_a_charset_does_not_matter(server):
    body = json.dumps(body_of(COMPLETIONS, {})).encode()
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert server.request("POST", COMPLETIONS, body, headers).status == 200


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", COMPLETIONS, "POST"),
        ("PUT", CHAT, "POST"),
        ("DELETE", "/v1/models/planner", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
    ],
)
def test_wrong_method(server, method, path, allowed):
    answer = server.request(method, path)
    assert answer.status == 405
    assert answer.headers["Allow"] == allowed
    assert answer.error["code"] == "method_not_allowed"


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/embeddings", "/v1/completions//", "/..%2f"])
def test_unknown_path(server, path):
    answer = server.post(path, {})
    assert answer.status == 404
    assert answer.error["code"] == "not_found"


def test_unknown_model_of_the_models_endpoint(server):
    answer = server.get("/v1/models/nobody%22%F0%9F%99%82")
    assert answer.status == 404
    assert answer.error["code"] == "model_not_found"


def test_a_refusal_of_the_engine_itself(server):
    server.engine.submit_error = RequestError("no such thing", param="prompt", code="odd")
    answer = server.complete()
    server.engine.submit_error = None
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, "prompt", "odd")


def test_a_bug_is_a_500_and_the_server_lives(server, caplog):
    server.engine.submit_error = ZeroDivisionError("secret detail")
    answer = server.complete()
    server.engine.submit_error = None
    assert answer.status == 500
    assert answer.error == {
        "message": "internal error",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert "secret detail" in caplog.text
    assert server.complete().status == 200


def test_a_full_queue_is_429_and_takes_no_sample_of_the_request(tokenizer):
    engine = fake_engine(tokenizer, fake_config(max_queue=2))
    with running_server(engine) as client:
        answer = client.complete(n=3)
        assert answer.status == 429
        assert answer.headers["Retry-After"] == "2"
        assert answer.error["type"] == "rate_limit_error"
        eventually(lambda: engine.running_ids == [])
        assert client.complete(n=2).status == 200


def test_a_queue_full_error_without_a_number_asks_for_a_second(client):
    client.engine.submit_error = QueueFullError("full", retry_after=0.0)
    assert client.complete().headers["Retry-After"] == "1"


def test_a_body_over_the_limit(tokenizer):
    engine = fake_engine(tokenizer, fake_config(max_body_bytes=1000))
    with running_server(engine) as client:
        assert client.complete("x" * 500).status in (200, 400)
        answer = client.complete("x" * 1000)
        assert answer.status == 413
        assert answer.error["code"] == "body_too_large"
        # Without a declared length it is found out on the way.
        chunk = b"x" * 600
        data = b"%x\r\n%s\r\n" % (len(chunk), chunk)
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        with client.raw(head + data * 2 + b"0\r\n\r\n") as sock:
            assert sock.recv(100).startswith(b"HTTP/1.1 413 ")
        assert client.complete().status == 200


class TestApiKey:
    @pytest.fixture
    def locked(self, tokenizer):
        with running_server(fake_engine(tokenizer, fake_config(api_key="sésame"))) as client:
            yield client

    @pytest.mark.parametrize(
        "header", [None, "", "Bearer", "Bearer wrong", "Basic sésame", "sésame", "Bearer \udcff"]
    )
    def test_a_wrong_key(self, locked, header):
        headers = {"Content-Type": "application/json"}
        if header is not None:
            headers["Authorization"] = header.encode("utf-8", "surrogateescape")
        for path in (COMPLETIONS, "/tokenize", "/nowhere"):
            answer = locked.request("POST", path, b"{}", headers)
            assert answer.status == 401
            assert answer.error["type"] == "authentication_error"
            assert answer.error["code"] == "invalid_api_key"

    def test_the_right_key(self, locked):
        body = json.dumps(body_of(COMPLETIONS, {})).encode()
        headers = {
            "Content-Type": "application/json",
            "Authorization": "Bearer sésame".encode(),
        }
        assert locked.request("POST", COMPLETIONS, body, headers).status == 200

    def test_probes_need_no_key(self, locked):
        for path in ("/health", "/ready", "/metrics", "/version"):
            assert locked.get(path).status == 200
