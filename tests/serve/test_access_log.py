"""One line a request; what it says, and what it never says."""

import json

import pytest

from pshare_jax.serve.logs import ACCESS_LOGGER
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import eventually, running_server

SECRET = "a prompt that is nobody else's business"


def lines_of(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == ACCESS_LOGGER]


@pytest.fixture
def json_server(tokenizer, caplog):
    caplog.set_level("INFO")
    config = fake_config(access_log="json", api_key="the key")
    with running_server(fake_engine(tokenizer, config)) as client:
        yield client


def test_a_line_says_what_a_request_cost(json_server, caplog):
    json_server.post(
        "/v1/completions?secret=1",
        {"model": "planner", "prompt": SECRET, "max_tokens": 2},
        Authorization="Bearer the key",
        **{"X-Request-Id": "abc"},
    )
    eventually(lambda: lines_of(caplog))
    line = json.loads(lines_of(caplog)[0])
    times = {name: line.pop(name) for name in ("time", "seconds", "ttft_seconds", "bytes")}
    assert line == {
        "request_id": "abc",
        "remote": "127.0.0.1",
        "key": "default",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "model": "planner",
        "stream": False,
        "prompt_tokens": len(json_server.engine.submitted[0].prompt_token_ids),
        "cached_tokens": 0,
        "completion_tokens": 2,
        "finish_reasons": ["length"],
    }
    assert times["time"].endswith("+00:00")
    assert 0 < times["ttft_seconds"] <= times["seconds"]
    assert times["bytes"] > 100


@pytest.mark.parametrize("stream", [False, True])
def test_neither_prompts_nor_answers_nor_keys_are_logged(json_server, caplog, stream):
    body = {"model": "planner", "prompt": SECRET, "stream": stream}
    json_server.post("/v1/completions", body, Authorization="Bearer the key")
    json_server.post("/v1/completions", body, Authorization="Bearer another")
    json_server.post("/v1/completions", {**body, "model": SECRET}, Authorization="Bearer the key")
    eventually(lambda: len(lines_of(caplog)) == 3)
    assert [json.loads(line)["status"] for line in lines_of(caplog)] == [200, 401, 404]
    for text in (SECRET, "hello", "the key", "another"):
        assert all(text not in line for line in lines_of(caplog))


def test_text_and_none(tokenizer, caplog):
    caplog.set_level("INFO")
    for kind, expected in (("text", 1), ("off", 0)):
        caplog.clear()
        with running_server(fake_engine(tokenizer, fake_config(access_log=kind))) as client:
            assert client.get("/version").status == 200
        assert len(lines_of(caplog)) == expected
        assert all('"GET /version HTTP/1.1" 200' in line for line in lines_of(caplog))
