"""A server that fails, truncates or miscounts is found out, whatever it does."""

import json
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from pshare_jax.bench.agents_client import CompletionClient, Endpoint
from pshare_jax.bench.agents_load import Load, Player
from pshare_jax.bench.agents_workload import Workload
from pshare_jax.errors import BenchmarkError

PROMPT = [5, 6, 7]


def choice(text: str, ids: list[int] | None, reason: str | None = None) -> dict[str, Any]:
    found = {"index": 0, "text": text, "finish_reason": reason}
    return {"choices": [found if ids is None else {**found, "token_ids": ids}]}


def usage(prompt: int = 3, completion: int = 4, **details: int) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    return {"choices": [], "usage": {**counts, "prompt_tokens_details": details or None}}


GOOD = [
    choice("a", [1]),
    choice("", [2]),
    choice("bc", [3, 4], "length"),
    usage(cached_tokens=2, shared_tokens=1),
    "[DONE]",
]


def scripted(events: list[Any], bodies: list[Any] | None = None) -> TestServer:
    async def answer(request: web.Request) -> web.StreamResponse:
        if bodies is not None:
            bodies.append(await request.json())
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            text = event if isinstance(event, str) else json.dumps(event)
            await response.write(f"data: {text}\n\n".encode())
        return response

    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    return TestServer(app)


async def ask(server: TestServer, want_ids: bool = True, apart: bool = False, **extra: Any):
    async with server, aiohttp.ClientSession() as http:
        client = CompletionClient(http, extra, want_ids, apart)
        return await client.complete(Endpoint(str(server.make_url("")).rstrip("/"), "m"), PROMPT, 4)


async def test_models_that_must_not_share_have_a_salt_each():
    for apart, salt in ((True, "m"), (False, None)):
        bodies: list[Any] = []
        await ask(scripted(GOOD, bodies), apart=apart)
        assert bodies[0].get("cache_salt") == salt


async def test_a_whole_reply():
    bodies: list[Any] = []
    reply = await ask(scripted(GOOD, bodies), min_tokens=4)
    assert reply.token_ids == [1, 2, 3, 4]
    assert (reply.cached, reply.shared) == (2, 1)
    assert len(reply.arrivals) == 3
    assert reply.arrivals == sorted(reply.arrivals)
    assert reply.end >= reply.arrivals[-1]
    [body] = bodies
    assert body == {
        "model": "m",
        "prompt": PROMPT,
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "min_tokens": 4,
    }


async def test_a_server_without_token_ids_and_details():
    events = [choice("a", None), choice("", None, "length"), usage(), "[DONE]"]
    reply = await ask(scripted(events), want_ids=False)
    assert (reply.token_ids, reply.cached, reply.shared) == (None, None, None)
    assert len(reply.arrivals) == 1


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (GOOD[:-1], r"without \[DONE\]"),
        ([*GOOD[:3], "[DONE]"], "no usage"),
        ([choice("a", [1, 2], "stop"), usage(completion=2), "[DONE]"], "finish_reason is 'stop'"),
        ([*GOOD[:2], usage(), "[DONE]"], "finish_reason is None"),
        ([*GOOD[:3], usage(completion=3), "[DONE]"], "completion_tokens is 3 where 4"),
        ([*GOOD[:3], usage(prompt=2), "[DONE]"], "prompt_tokens is 2 where 3"),
        ([*GOOD[1:3], usage(), "[DONE]"], "number of token_ids is 3 where 4"),
        ([choice("a", None, "length"), usage(), "[DONE]"], "no token_ids .*--replies=scripted"),
        ([GOOD[0], {"error": {"message": "out of pages"}}], "out of pages"),
        ([GOOD[0], "{broken"], "JSONDecodeError"),
    ],
)
async def test_faults_are_named(events, message):
    with pytest.raises(BenchmarkError, match=message) as caught:
        await ask(scripted(events))
    assert "model m: " in str(caught.value)


async def test_a_refusal_is_no_reply():
    app = web.Application()

    async def refuse(_: web.Request) -> web.Response:
        return web.Response(status=429, text="queue full")

    app.router.add_post("/v1/completions", refuse)
    with pytest.raises(BenchmarkError, match="status 429: queue full"):
        await ask(TestServer(app))


async def test_a_cut_connection_is_no_reply():
    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'data: {"choices": []}\n\n')
        assert request.transport is not None
        request.transport.close()
        return response

    app = web.Application()
    app.router.add_post("/v1/completions", cut)
    with pytest.raises(BenchmarkError, match=r"ClientPayloadError|without \[DONE\]"):
        await ask(TestServer(app))


async def test_one_bad_reply_ends_the_run():
    """The third call of the run is truncated."""
    count = 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal count
        count += 1
        prompt = len((await request.json())["prompt"])
        events = [*GOOD[:3], usage(prompt, 3 if count == 3 else 4), "[DONE]"]
        lines = (e if isinstance(e, str) else json.dumps(e) for e in events)
        return web.Response(text="".join(f"data: {line}\n\n" for line in lines))

    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    async with TestServer(app) as server, aiohttp.ClientSession() as http:
        endpoint = Endpoint(str(server.make_url("")).rstrip("/"), "m")
        player = Player(
            CompletionClient(http, {}, want_ids=True),
            [endpoint] * 2,
            Workload(models=2, turns=2, prompt=20, generated=4, observed=3),
            lambda text: list(text.encode()),
        )
        with pytest.raises(BenchmarkError, match="completion_tokens is 3 where 4"):
            await player.play(Load(sessions=5, concurrency=1, rate=0.0, seed=0))
    # One more session may begin before the failure has stopped everything.
    assert count <= 4
