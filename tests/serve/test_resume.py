"""Streams that another frontend goes on with, from any event on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pshare_jax.config import ClusterConfig
from pshare_jax.text.tokenizer import Tokenizer
from tests.serve.fake import FakeOrchestrator, fake_config, fake_engine
from tests.serve.server import Client, running_server

TEXT = "hello wörld, and what is «more» than that"


def frontend(tokenizer: Tokenizer, tokens_per_event: int) -> FakeOrchestrator:
    config = replace(fake_config(), cluster=ClusterConfig(workers=["127.0.0.1:1"]))
    engine = fake_engine(tokenizer, config, TEXT)
    engine.tokens_per_event = tokens_per_event
    return engine


@pytest.fixture(scope="module")
def two(tokenizer: Tokenizer) -> Iterator[tuple[Client, Client]]:
    """Two frontends, whose engines give tokens in groups of other sizes."""
    with (
        running_server(frontend(tokenizer, 3)) as first,
        running_server(frontend(tokenizer, 2)) as second,
    ):
        yield first, second


def stream(client: Client, path: str, body: dict[str, Any], last: str | None = None) -> list[Any]:
    """The events of a stream: (id, data)."""
    headers = {} if last is None else {"Last-Event-ID": last}
    answer = client.post(path, {"model": "planner", "stream": True, **body}, **headers)
    assert answer.status == 200, answer.body
    events = []
    for block in answer.body.decode().removesuffix("\n\n").split("\n\n"):
        id, _, data = block.partition("\n")
        events.append((id.removeprefix("id: "), data.removeprefix("data: ")))
    return events


BODIES = [
    ("/v1/completions", {"prompt": "hello", "max_tokens": 60}),
    ("/v1/completions", {"prompt": "hello", "max_tokens": 60, "stop": ["what"], "echo": True}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 60, "logprobs": 2}),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 60,
            "stream_options": {"include_usage": True},
        },
    ),
]


def by_choice(events: list[Any]) -> dict[int, list[Any]]:
    """What each choice got, in order; -1 are events of none. Usage may tell of cache hits."""
    found: dict[int, list[Any]] = {}
    for _, data in events:
        event = data if data == "[DONE]" else json.loads(data)
        choices = event["choices"] if isinstance(event, dict) else []
        if isinstance(event, dict):
            event.pop("usage", None)
        found.setdefault(choices[0]["index"] if choices else -1, []).append(event)
    return found


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_another_frontend_goes_on_from_any_event(
    two: tuple[Client, Client], path: str, body: dict[str, Any]
) -> None:
    first, second = two
    whole = stream(first, path, body)
    assert len({id for id, _ in whole}) == len(whole)
    for cut in range(1, len(whole), 3):
        rest = stream(second, path, body, whole[cut - 1][0])
        assert by_choice(whole[:cut] + rest) == by_choice(whole)


def test_the_seed_is_that_of_the_answer(two: tuple[Client, Client]) -> None:
    first, second = two
    body = {"prompt": "seeded", "max_tokens": 20, "n": 2}
    whole = stream(first, "/v1/completions", body)
    stream(second, "/v1/completions", body, whole[2][0])
    begun, gone_on = first.engine.submitted[-2:], second.engine.submitted[-2:]
    seeds = [request.params.seed for request in begun]
    assert [request.params.seed for request in gone_on] == seeds
    assert seeds[1] == (seeds[0] + 1) % 2**32
    stream(first, "/v1/completions", body)
    assert first.engine.submitted[-2].params.seed != seeds[0]
    assert not {request.id for request in begun} & {request.id for request in gone_on}


def test_a_seed_of_the_body_stays(two: tuple[Client, Client]) -> None:
    stream(two[0], "/v1/completions", {"prompt": "x", "seed": 7, "max_tokens": 4})
    assert two[0].engine.submitted[-1].params.seed == 7


@pytest.mark.parametrize("last", ["", "5", "cmpl-1.2.3.4", "cmpl-" + "0" * 32 + ".1.x.1-2", "é"])
def test_what_is_no_event_is_refused(two: tuple[Client, Client], last: str) -> None:
    body = {"model": "planner", "prompt": "x", "stream": True}
    answer = two[0].post("/v1/completions", body, **{"Last-Event-ID": last})
    assert answer.status == 400
    assert "Last-Event-ID is not the id of an event" in answer.error["message"]


@pytest.mark.parametrize(
    "change", [{"prompt": "other"}, {"max_tokens": 5}, {"temperature": 0.5}, {"n": 2}]
)
def test_another_body_is_refused(two: tuple[Client, Client], change: dict[str, Any]) -> None:
    body = {"model": "planner", "prompt": "mine", "stream": True, "max_tokens": 9}
    last = stream(two[0], "/v1/completions", body)[1][0]
    answer = two[1].post("/v1/completions", {**body, **change}, **{"Last-Event-ID": last})
    assert answer.status == 409
    assert "send the same body again" in answer.error["message"]


def test_the_answer_of_a_module_that_was_replaced_is_not_gone_on_with(tokenizer: Tokenizer) -> None:
    """Its other half would be by other weights, and nobody would know."""
    body = {"model": "coder", "prompt": "mine", "stream": True, "max_tokens": 9}
    engine = frontend(tokenizer, 1)
    with running_server(engine) as client:
        last = stream(client, "/v1/completions", body)[1][0]
        assert client.post("/v1/completions", body, **{"Last-Event-ID": last}).status == 200
        engine.models["coder"] = replace(engine.models["coder"], fingerprint="another")
        answer = client.post("/v1/completions", body, **{"Last-Event-ID": last})
    assert answer.status == 409
    assert "has been replaced" in answer.error["message"]


def test_an_answer_of_other_arithmetic_is_not_gone_on_with(tokenizer: Tokenizer) -> None:
    body = {"model": "planner", "prompt": "mine", "stream": True, "max_tokens": 9}
    engine = frontend(tokenizer, 1)
    with running_server(engine) as client:
        last = stream(client, "/v1/completions", body)[1][0]
        for changed in ({"weights": "int8"}, {"kv_dtype": "fp8"}, {"dtype": "float32"}):
            config = engine.config
            engine.config = replace(config, **changed)
            answer = client.post("/v1/completions", body, **{"Last-Event-ID": last})
            assert answer.status == 409, changed
            engine.config = config
        assert client.post("/v1/completions", body, **{"Last-Event-ID": last}).status == 200


def test_one_process_gives_no_ids(client: Client) -> None:
    """Streams are as they were, and the header means nothing."""
    body = {"model": "planner", "prompt": "x", "stream": True}
    answer = client.post("/v1/completions", body, **{"Last-Event-ID": "whatever"})
    assert answer.status == 200
    assert not re.search(rb"^id:", answer.body, re.MULTILINE)
