"""Answers over HTTP and from an engine in this process."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from aiohttp import web

from pshare_jax.errors import EvaluationError, RequestError, UnknownModelError
from pshare_jax.evals import sandbox
from pshare_jax.evals.backend import Answer, Sampling
from pshare_jax.evals.items import Item
from pshare_jax.evals.offline import OfflineBackend
from pshare_jax.evals.run import evaluate
from pshare_jax.evals.server import ServerBackend
from tests.evals.helpers import FUNCTION, Scripted, item

WORDS = ("the quick", "brown fox", "jumps over", "the lazy", "dog and", "then", "sleeps all")
ITEMS = [
    *(item(f"i{n}", " ".join(words)) for n, words in enumerate(itertools.permutations(WORDS, 2))),
    item("tools", "weather?", kind="tools", tools=[FUNCTION], reference=[{"weather": {}}]),
    item(
        "turns",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "how are you?"},
        ],
    ),
]
SHORT = Sampling(max_tokens=8)


def answers(backend: Any, items: list[Item], sampling: Sampling = SHORT) -> list[Answer]:
    given: dict[int, Answer] = {}
    backend.answer(items, sampling, given.__setitem__)
    return [given[index] for index in range(len(items))]


@pytest.mark.parametrize(
    ("model", "sampling"),
    [
        ("base", SHORT),
        ("coder", Sampling(max_tokens=12, temperature=0.9, seed=5, stop=("t",))),
    ],
)
def test_both_ways_give_the_same_answers(engine, url, model, sampling):
    offline = answers(OfflineBackend(engine, model), ITEMS, sampling)
    assert answers(ServerBackend(url, model), ITEMS, sampling) == offline
    assert len({answer.text for answer in offline}) > len(ITEMS) // 2
    assert all(1 <= (answer.completion_tokens or 0) <= 12 for answer in offline)
    assert {answer.finish_reason for answer in offline} <= {"stop", "length"}


def test_the_tools_are_in_the_prompt(engine):
    with_tools, without = ITEMS[-2], item(question="weather?")
    long, short = answers(OfflineBackend(engine, "base"), [with_tools, without])
    assert (long.prompt_tokens or 0) > (short.prompt_tokens or 0) + 50


def test_what_generates_is_described(engine, url):
    offline = OfflineBackend(engine, "coder").describe()
    assert offline["config"]["max_model_len"] == 512
    assert offline["model_info"]["sharing"] == "shared"
    server = ServerBackend(url, "coder").describe()
    assert server["url"] == url
    assert server["model_info"]["parent"] == offline["model_info"]["parent"]
    assert "version" in json.dumps(server["server_version"])


def test_items_that_cannot_be_answered_are_named(engine, url):
    long = item("long", "word " * 600)
    for backend in (OfflineBackend(engine, "base"), ServerBackend(url + "/v1/", "base")):
        with pytest.raises(EvaluationError, match=r"item long: .*maximum context length is 512"):
            answers(backend, [ITEMS[0], long])
    odd = item("odd", messages=[{"role": "narrator", "content": "x"}])
    for backend in (OfflineBackend(engine, "base"), ServerBackend(url, "base")):
        with pytest.raises(EvaluationError, match=r"item odd: .*narrator"):
            answers(backend, [ITEMS[0], odd])
    with pytest.raises(RequestError, match="stop may hold at most"):
        answers(OfflineBackend(engine, "base"), ITEMS[:1], Sampling(stop=tuple("abcdefghi") * 3))


def test_unknown_models(engine, url):
    with pytest.raises(UnknownModelError, match="no model 'x' is served; there are base, coder"):
        OfflineBackend(engine, "x")
    with pytest.raises(EvaluationError, match="serves no model 'x'; there are base, coder"):
        ServerBackend(url, "x").describe()


def test_no_server():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        with pytest.raises(EvaluationError, match=r"cannot be reached: .*does the server run\?"):
            ServerBackend(url, "base").describe()
        patient = ServerBackend(url, "base", attempts=2, first_wait_seconds=0.01)
        with pytest.raises(EvaluationError, match=r"item i0: .*no answer after 2 attempts"):
            answers(patient, ITEMS[:1])


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextmanager
def serving(chat: Handler) -> Iterator[str]:
    """A server whose `/v1/chat/completions` is `chat`."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[web.AppRunner, str]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", chat)
        app.router.add_get("/v1/models", models)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    def call(coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)

    runner, url = call(start())
    try:
        yield url
    finally:
        call(runner.cleanup())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def completion(text: str | None, **message: Any) -> web.Response:
    choice = {"message": {"content": text, **message}, "finish_reason": "stop"}
    return web.json_response({"choices": [choice]})


def test_busy_servers_are_asked_again():
    asked: list[int] = []

    async def chat(request: web.Request) -> web.StreamResponse:
        asked.append(len(asked))
        match len(asked):
            case 1:
                headers = {"Retry-After": "0"}
                return web.json_response(
                    {"error": {"message": "full"}}, status=429, headers=headers
                )
            case 2:
                return web.Response(status=503, text="warming up")
            case 3:
                request.transport.close()
                return web.Response()
        return completion("here")

    with serving(chat) as url:
        backend = ServerBackend(url, "m", first_wait_seconds=0.01)
        assert answers(backend, ITEMS[:1]) == [Answer("here", "stop", None, None)]
    assert len(asked) == 4


def test_a_server_that_stays_busy_is_given_up():
    async def chat(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "too many waiting"}}, status=429)

    with serving(chat) as url:
        backend = ServerBackend(url, "m", attempts=3, first_wait_seconds=0.01)
        with pytest.raises(EvaluationError, match="after 3 attempts: 429: too many waiting"):
            answers(backend, ITEMS[:5])


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (lambda: web.Response(status=401, text="who are you"), "item i0: .*401: who are you"),
        (lambda: web.Response(status=500), "500: no message"),
        (lambda: web.Response(text="{"), "item i0: .*not valid JSON"),
        (lambda: web.json_response([1]), "no chat completion"),
        (lambda: web.json_response({"choices": []}), "no chat completion"),
    ],
)
def test_wrong_answers_of_servers_end_the_evaluation_at_once(response, message):
    asked: list[int] = []

    async def chat(request: web.Request) -> web.StreamResponse:
        asked.append(1)
        return response()

    with serving(chat) as url, pytest.raises(EvaluationError, match=message):
        answers(ServerBackend(url, "m", concurrency=1), ITEMS)
    assert len(asked) == 1


def test_tool_calls_that_the_server_parsed_are_graded():
    bodies: list[Any] = []

    async def chat(request: web.Request) -> web.StreamResponse:
        bodies.append((await request.json(), request.headers["Authorization"]))
        function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
        return completion(None, tool_calls=[{"type": "function", "function": function}])

    one = item(kind="tools", tools=[FUNCTION], reference=[{"weather": {"city": ["Oslo"]}}])
    with serving(chat) as url:
        result = evaluate(ServerBackend(url, "m", api_key="secret"), [one], Sampling(stop=("x",)))
    assert result["accuracy"] == 1.0
    assert result["answers"][0]["output"] == '[{"name": "weather", "arguments": {"city": "Oslo"}}]'
    assert "secret" not in json.dumps(result)
    body, authorization = bodies[0]
    assert authorization == "Bearer secret"
    assert body == {
        "model": "m",
        "messages": one.messages,
        "max_tokens": 512,
        "temperature": 0.0,
        "seed": 0,
        "stop": ["x"],
        "tools": [{"type": "function", "function": FUNCTION}],
    }


def test_requests_are_bounded():
    running, most = 0, 0

    async def chat(request: web.Request) -> web.StreamResponse:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return completion("x")

    with serving(chat) as url:
        answers(ServerBackend(url, "m", concurrency=5), ITEMS)
    assert most == 5


def test_a_result_has_everything_in_the_items_order():
    reference = {"entry_point": "f", "tests": "assert f() == 1"}
    items = [
        item("exact"),
        item("code", kind="code", reference=reference),
        item("math", kind="math", reference="4"),
        item("wrong"),
    ]
    texts = {"exact": "Yes.", "code": "def f(): return 1", "math": "so 4", "wrong": "no"}
    seen: list[tuple[int, int]] = []
    result = evaluate(
        Scripted(texts), items, SHORT, report=lambda graded, right: seen.append((graded, right))
    )
    assert [answer["id"] for answer in result["answers"]] == ["exact", "code", "math", "wrong"]
    assert [answer["correct"] for answer in result["answers"]] == [True, True, True, False]
    assert result["answers"][3] == {
        "id": "wrong",
        "correct": False,
        "detail": "'no' is not 'yes'",
        "output": "no",
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "completion_tokens": 3,
    }
    assert (result["items"], result["correct"], result["accuracy"]) == (4, 3, 0.75)
    assert (result["prompt_tokens"], result["completion_tokens"]) == (28, 12)
    assert result["bootstrap_95"][0] < 0.75 < result["bootstrap_95"][1]
    assert seen[-1] == (4, 3)
    assert [graded for graded, _ in seen] == [1, 2, 3, 4]
    assert result["sampling"]["max_tokens"] == 8
    assert "jax" in result["versions"]


def test_a_sandbox_that_does_not_work_is_noticed_before_anything_is_generated(monkeypatch):
    def broken(*_: Any) -> sandbox.Outcome:
        return sandbox.Outcome(False, "no python")

    monkeypatch.setattr(sandbox, "run", broken)
    reference = {"entry_point": "f", "tests": "assert f() == 1"}
    with pytest.raises(EvaluationError, match="does not work here: no python"):
        evaluate(Scripted({}), [item(kind="code", reference=reference)], SHORT)
