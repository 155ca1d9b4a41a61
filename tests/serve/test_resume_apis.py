"""Streams of every API are gone on with at another frontend, after a cut anywhere."""

from __future__ import annotations

import http.client
import json
from array import array
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest

from pshare_jax.config import ClusterConfig
from pshare_jax.core.requests import Request
from pshare_jax.serve.resume import MAX_SLOTS, _packed, _unpacked
from pshare_jax.text.tokenizer import Tokenizer
from tests.serve.fake import FakeOrchestrator, fake_config, fake_engine
from tests.serve.server import Client, running_server
from tests.serve.test_messages import TOOLS as ANTHROPIC_TOOLS
from tests.serve.test_messages import WHOLE
from tests.serve.test_responses import TOOLS as RESPONSES_TOOLS
from tests.serve.test_tools import TEMPLATE, TOOLS, USER
from tests.text.tiny import write_byte_level

Event = tuple[str, str, Any]
"""Id, name and data of an event."""

MODELS = ["planner", "coder", "nobody"]


def frontend(tokenizer: Tokenizer, tokens_per_event: int) -> FakeOrchestrator:
    """What it says depends on the seed, and comes in groups."""
    config = replace(
        fake_config(max_model_len=2048, api_key="secret"),
        cluster=ClusterConfig(workers=["127.0.0.1:1"]),
    )
    engine = fake_engine(tokenizer, config)

    def script(request: Request) -> list[int]:
        said = WHOLE.replace("I look", f"I look ({request.params.seed}, {request.model})")
        return [*tokenizer.encode(said), tokenizer.eos_token_ids[0]]

    engine.script = script
    engine.tokens_per_event = tokens_per_event
    return engine


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Client]]:
    """Two frontends, whose engines give tokens in groups of other sizes."""
    tokenizer = Tokenizer.load(write_byte_level(tmp_path_factory.mktemp("resume"), TEMPLATE))
    with (
        running_server(frontend(tokenizer, 7)) as first,
        running_server(frontend(tokenizer, 3)) as second,
    ):
        yield first, second


def stream(client: Client, path: str, body: dict[str, Any], last: str = "", cut: int = -1) -> Any:
    """`stream_of` a client's server."""
    return stream_of(client.port, path, body, last, cut)


def stream_of(port: int, path: str, body: dict[str, Any], last: str = "", cut: int = -1) -> Any:
    """The events of a stream; the connection is cut in the middle of event number `cut`."""
    headers = {"Content-Type": "application/json", "x-api-key": "secret"}
    headers |= {"Authorization": "Bearer secret"} | ({"Last-Event-ID": last} if last else {})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, json.dumps({**body, "stream": True}), headers)
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    events: list[Event] = []
    id = name = ""
    for line in answer:
        kind, _, text = line.decode().rstrip("\n").partition(": ")
        if kind == "id":
            if len(events) == cut:
                break
            id = text
        elif kind == "event":
            name = text
        elif kind == "data":
            events.append((id, name, text if text == "[DONE]" else json.loads(text)))
            id = name = ""
    connection.close()
    return events


API_BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "messages": (
        "/v1/messages",
        {"model": "planner", "max_tokens": 500, "messages": USER, "tools": ANTHROPIC_TOOLS},
    ),
    "responses": (
        "/v1/responses",
        {"model": "planner", "input": "weather?", "tools": RESPONSES_TOOLS, "metadata": {"a": "b"}},
    ),
    "chat": (
        "/v1/chat/completions",
        {"model": "planner", "messages": USER, "tools": TOOLS, "n": 3, "temperature": 1.0},
    ),
    "fan-out": (
        "/v1/fanout",
        {
            "model": MODELS,
            "messages": USER,
            "tools": TOOLS,
            "n": 2,
            "stream_options": {"include_usage": True},
        },
    ),
    "many choices": (
        "/v1/completions",
        {"model": "planner", "prompt": ["a", "b"], "n": 20, "max_tokens": 9, "seed": 3},
    ),
}


def told(events: list[Event]) -> dict[Any, list[Any]]:
    """What each choice of each model was told, in order; usage may tell of cache hits."""
    found: dict[Any, list[Any]] = {}
    for _, name, data in events:
        place: Any = None
        if isinstance(data, dict):
            data = without_usage(data)
            choices = data.get("choices")
            place = data.get("model"), choices[0]["index"] if choices else None
        found.setdefault(place, []).append((name, data))
    return found


def without_usage(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: without_usage(value) for key, value in data.items() if key != "usage"}
    return [without_usage(one) for one in data] if isinstance(data, list) else data


@pytest.mark.parametrize("api", API_BODIES)
def test_another_frontend_goes_on_from_any_event(two: tuple[Client, Client], api: str) -> None:
    first, second = two
    path, body = API_BODIES[api]
    whole = stream(first, path, body)
    ids = [id for id, _, _ in whole]
    assert all(ids)
    assert len(set(ids)) == len(ids)
    assert max(map(len, ids)) < 200
    step = max(len(whole) // 8, 1)
    for cut in (1, *range(2, len(whole), step), len(whole) - 1):
        rest = stream(second, path, body, ids[cut - 1])
        assert told(whole[:cut] + rest) == told(whole)


@pytest.mark.parametrize("api", API_BODIES)
def test_a_connection_that_is_cut_in_mid_event(two: tuple[Client, Client], api: str) -> None:
    """Twice; each time by another frontend, from what has come whole."""
    path, body = API_BODIES[api]
    begun = stream(two[0], path, body, cut=5)
    assert len(begun) == 5
    more = stream(two[1], path, body, begun[-1][0], cut=6)
    rest = stream(two[0], path, body, more[-1][0])
    got = begun + more + rest
    assert len({id for id, _, _ in got}) == len(got)
    # The same answer as one that nobody has cut, gone on with from its first event.
    assert told([got[0], *stream(two[1], path, body, got[0][0])]) == told(got)


def test_the_whole_response_has_the_ids_that_were_streamed(two: tuple[Client, Client]) -> None:
    """Calls are answered by their ids, and those may have come from a frontend that is dead."""
    path, body = API_BODIES["responses"]
    whole = stream(two[0], path, body)
    cut = next(i for i, (_, name, _) in enumerate(whole) if name.endswith("arguments.delta"))
    rest = stream(two[1], path, body, whole[cut][0])
    numbers = [data["sequence_number"] for _, _, data in whole[: cut + 1] + rest]
    assert numbers == list(range(len(numbers)))
    added = [data["item"] for _, name, data in whole[: cut + 1] if name.endswith("item.added")]
    final = rest[-1][2]["response"]
    assert final["id"] == whole[0][2]["response"]["id"]
    for ours, theirs in zip(added, final["output"], strict=False):
        assert ours["id"] == theirs["id"]
        assert ours.get("call_id") == theirs.get("call_id")
    assert len({item["id"] for item in final["output"]}) == 4
    calls = [item["call_id"] for item in final["output"] if item["type"] == "function_call"]
    assert len(set(calls)) == 2


def test_seeds_of_a_fan_out_are_those_of_its_answer(two: tuple[Client, Client]) -> None:
    first, second = two
    path, body = API_BODIES["fan-out"]
    whole = stream(first, path, body)
    stream(second, path, body, whole[3][0])
    begun, gone_on = first.engine.submitted[-4:], second.engine.submitted[-4:]
    seeds = [request.params.seed for request in begun]
    assert len(set(seeds)) == 4
    assert [request.params.seed for request in gone_on] == seeds
    assert not {request.id for request in begun} & {request.id for request in gone_on}


@pytest.mark.parametrize(
    ("api", "change"),
    [
        ("messages", {"messages": [{"role": "user", "content": "else"}]}),
        ("responses", {"temperature": 0.25}),
        ("fan-out", {"model": ["planner", "coder"]}),
        ("fan-out", {"model": ["coder", "planner", "nobody"]}),
        ("many choices", {"n": 21}),
    ],
)
def test_another_body_is_refused(
    two: tuple[Client, Client], api: str, change: dict[str, Any]
) -> None:
    path, body = API_BODIES[api]
    last = stream(two[0], path, body)[1][0]
    changed = {**body, **change, "stream": True}
    headers = {"Last-Event-ID": last, "Authorization": "Bearer secret"}
    answer = two[1].post(path, changed, **headers)
    assert answer.status == 409
    assert "send the same body again" in answer.json["error"]["message"]


def test_an_id_of_another_api_is_refused(two: tuple[Client, Client]) -> None:
    path, body = API_BODIES["messages"]
    last = stream(two[0], path, body)[1][0].replace("msg-", "resp-")
    headers = {"Last-Event-ID": last, "Authorization": "Bearer secret"}
    assert two[0].post(path, {**body, "stream": True}, **headers).status == 409


def test_clients_read_streams_with_ids(two: tuple[Client, Client]) -> None:
    with (
        openai.OpenAI(base_url=f"{two[0].url}/v1", api_key="secret", max_retries=0) as api,
        api.responses.stream(model="planner", input="weather?", tools=RESPONSES_TOOLS) as got,
    ):
        assert got.get_final_response().status == "completed"


@pytest.mark.parametrize("count", [1, 17, MAX_SLOTS])
def test_positions_are_short_and_come_back(count: int) -> None:
    counts = array("I", [1000 + i % 3 for i in range(count)])
    assert _unpacked(_packed(counts)) == counts
    assert len(_packed(counts)) < 30 + count / 2


@pytest.mark.parametrize("text", ["A", "_-_-", "eJw", "AAAA", "-" * 40])
def test_what_is_no_position_is_none(text: str) -> None:
    assert _unpacked(text) is None


def test_a_position_that_unpacks_to_too_much_is_none() -> None:
    assert _unpacked(_packed(array("I", [0] * 10 * MAX_SLOTS))) is None
