"""Sessions over HTTP: where the hints may stand, what reaches the engine, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from pshare_jax.core.requests import Session
from tests.serve.server import Client

HINTS = {"session_id": "s-1", "ttl": 2.5, "next_models": ["coder", "team/critic", "coder"]}
EXPECTED = Session("s-1", 2.5, ("coder", "team/critic"))
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello"},
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {**CHAT, "max_tokens": 4},
}


def ask(client: Client, path: str, headers: dict[str, str] | None = None, **fields: Any):
    return client.post(path, {"model": "planner", **BODIES[path], **fields}, **(headers or {}))


@pytest.mark.parametrize("path", BODIES)
def test_hints_reach_the_engine_from_every_endpoint(client: Client, path: str) -> None:
    answer = ask(client, path, **HINTS)
    assert answer.status == 200
    assert "Warnings" not in answer.headers, "the fields are known"
    assert ask(client, path, {"X-Session-Id": "s-1"}).status == 200
    assert ask(client, path).status == 200
    sessions = [request.session for request in client.engine.submitted]
    assert sessions == [EXPECTED, Session("s-1"), Session()]
    assert all(request.goes_on for request in client.engine.submitted)


def test_no_reply_of_several_samples_is_said_to_go_on(client: Client) -> None:
    client.complete(n=2, session_id="s")
    assert [request.goes_on for request in client.engine.submitted] == [False, False]
    assert {request.session.id for request in client.engine.submitted} == {"s"}


def test_a_reply_that_ends_with_a_stop_string_is_complete_and_an_abandoned_one_is_not(
    client: Client,
) -> None:
    # The engine may be through before the string is found: then it has ended the reply itself.
    while not client.engine.completed:
        client.complete(stop="wor")
    assert client.engine.completed == [client.engine.submitted[-1].id]
    before = len(client.engine.aborted)
    client.engine.gate.clear()
    body = {"model": "planner", "prompt": "hello", "stream": True}
    with client.raw_request("/v1/completions", body):
        while not client.engine.running_ids:
            pass
    while client.engine.running_ids:
        pass
    assert len(client.engine.aborted) == before + 1
    assert len(client.engine.completed) == 1


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"session_id": "x" * 257}, "session_id", "at most 256 characters, got 257"),
        ({"session_id": 7}, "session_id", "Expected 'str | null', got 'int'"),
        ({"ttl": -1}, "ttl", "0 or more, got -1"),
        ({"ttl": "long"}, "ttl", "Expected 'float | null', got 'str'"),
        ({"next_models": ["plumber"]}, "next_models", "names 'plumber', which is not served"),
        ({"next_models": "coder"}, "next_models", "Expected 'array | null', got 'str'"),
    ],
)
def test_hints_that_cannot_be_are_refused_by_name(
    client: Client, fields: dict[str, Any], param: str, says: str
) -> None:
    answer = client.complete(**fields)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert says in answer.error["message"]
    assert client.engine.submitted == []


def test_a_header_and_a_field_must_not_differ(client: Client) -> None:
    answer = ask(client, "/v1/completions", {"X-Session-Id": "a"}, session_id="b")
    assert (answer.status, answer.error["param"]) == (400, "session_id")
    assert ask(client, "/v1/completions", {"X-Session-Id": "a"}, session_id="a").status == 200
    assert ask(client, "/v1/completions", {"X-Session-Id": ""}, session_id=None).status == 200


def test_an_id_of_any_bytes_is_refused_and_one_of_any_text_is_not(client: Client) -> None:
    """It is shown on the page at `/ui` and goes to other processes, as text."""
    for id in ("s\xff", "a\tb"):
        answer = ask(client, "/v1/completions", {"X-Session-Id": id})
        assert (answer.status, answer.error["param"]) == (400, "session_id")
    id = "Zürich 🙂"
    headers = {"X-Session-Id": id.encode().decode("latin-1")}
    assert ask(client, "/v1/completions", headers).status == 200
    assert client.engine.submitted[-1].session.id == id
