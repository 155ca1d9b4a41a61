"""Whatever one client sends, the others are answered meanwhile."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pshare_jax.serve.bodies import check_items
from pshare_jax.serve.errors import ApiError
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import Client, eventually, running_server
from tests.serve.test_completions import script

# What the loop may take at most, in processor time of the server: a machine that does other things
# is none of its faults. They make it slower, though: what holds the loop up does so each time.
SECONDS = 0.05
TRIES = 4
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tokenizer_folder) -> Iterator[Client]:
    """A server in a process of its own, which does nothing else."""
    (tokenizer_folder / "STARTED").touch()
    (tokenizer_folder / "OPEN").touch()
    command = [
        sys.executable,
        "-m",
        "tests.serve.fake_main",
        str(tokenizer_folder),
        "5",
        "0",
        "2048",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    ) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().rpartition(":")[2])
            assert process.stdout.readline()
            client = Client(process.pid, None, port)  # type: ignore[arg-type]
            eventually(lambda: client.get("/ready").status == 200)
            yield client
        finally:
            process.kill()


def used(pid: int) -> float:
    """Processor time of all threads of a process, in seconds."""
    tasks = Path(f"/proc/{pid}/task")
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9


def longest_delay(client: Client, send: Callable[[], Any]) -> float:
    """The most that the server worked before it answered `/health`, while `send` ran.

    As long as it took, at most.
    """
    seconds: list[float] = []
    done = threading.Event()
    pid: int = client.engine  # type: ignore[assignment]

    def probe() -> None:
        while not done.is_set():
            start, before = time.monotonic(), used(pid)
            assert client.get("/health").status == 200
            seconds.append(min(time.monotonic() - start, used(pid) - before))

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        send()
    finally:
        done.set()
        thread.join()
    return max(seconds)


def check_nobody_waits(client: Client, send: Callable[[], Any]) -> None:
    """Neither `/health` nor the loop's own thread is held up while `send` runs."""
    seen = []
    for _ in range(TRIES):
        before = own_lags(client)[1]
        delay = longest_delay(client, send)
        seen.append((delay, own_lags(client)[1] - before))
        if seen[-1][0] < SECONDS and not seen[-1][1]:
            return
    pytest.fail(f"held up each time; the longest in seconds, and how often the loop was: {seen}")


def values(prompt: list) -> bytes:
    return json.dumps({"model": "planner", "prompt": prompt}, separators=(",", ":")).encode()


HOSTILE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "texts": ("/v1/completions", lambda: values(["a"] * 900_000)),
    "lists": ("/v1/completions", lambda: values([[1]] * 900_000)),
    "ids": ("/v1/completions", lambda: values([1] * 1_900_000)),
    "ids of prompts": ("/v1/completions", lambda: values([[1] * 100_000] * 15)),
    "detokenize": (
        "/detokenize",
        lambda: json.dumps({"tokens": [10] * 1_300_000}, separators=(",", ":")).encode(),
    ),
    "messages": (
        "/v1/chat/completions",
        lambda: json.dumps(
            {"model": "planner", "messages": [{"role": "user", "content": "x"}] * 90_000}
        ).encode(),
    ),
    "unknown": (
        "/v1/completions",
        lambda: json.dumps(
            {"model": "planner", "prompt": "x", "surprise": [{}] * 900_000}
        ).encode(),
    ),
    "items": (
        "/v1/responses",
        lambda: json.dumps(
            {"model": "planner", "input": [{"role": "user", "content": "x"}] * 9_900}
        ).encode(),
    ),
    "echoes": (
        "/v1/completions",
        lambda: json.dumps(
            {"model": "planner", "prompt": [[5] * 2000] * 250, "n": 128, "echo": True}
        ).encode(),
    ),
    "blocks": (
        "/v1/messages",
        lambda: json.dumps(
            {
                "model": "planner",
                "max_tokens": 5,
                "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 9_000}],
                "tools": [{"name": "x"}] * 3000,
            }
        ).encode(),
    ),
    "a word": (
        "/v1/completions",
        lambda: json.dumps(
            {"model": "planner", "prompt": "x", "bad_words": ["ab" * 2_000_000]}
        ).encode(),
    ),
    "allowed ids": (
        "/v1/completions",
        lambda: json.dumps(
            {"model": "planner", "prompt": "x", "allowed_token_ids": [7] * 780_000},
            separators=(",", ":"),
        ).encode(),
    ),
    "quotes": ("/v1/completions", lambda: b'{"model": "planner", "prompt": "' + b'\\"' * 2_000_000),
}
"""Paths, and what makes the bodies: those of all take a second to write."""


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_is_refused_at_once_and_holds_nobody_up(server, name):
    path, written = HOSTILE[name]
    body = written()

    def send() -> None:
        answer = server.post(path, body)
        assert answer.status == 400, answer.body[:300]

    check_nobody_waits(server, send)


def test_words_are_tokenised_once_for_all_prompts(server):
    words = [f"{n:x} a word that is no word" for n in range(256)]
    body = {"model": "planner", "prompt": ["x"] * 250, "max_tokens": 1, "bad_words": words}
    check_nobody_waits(server, lambda: server.post("/v1/completions", body))


def test_a_long_text_is_tokenised_beside_the_loop(server):
    body = {"prompt": "the quick brown fox " * 150_000, "return_token_strs": True}

    def send() -> None:
        # Not decoded: that would hold this interpreter for longer than the server does.
        assert len(server.post("/tokenize", body).body) > 1_000_000

    check_nobody_waits(server, send)


def test_a_long_chat_is_rendered_beside_the_loop(server):
    messages = [{"role": "user", "content": "hello " * 200}] * 2000

    def send() -> None:
        answer = server.post("/v1/chat/completions", {"model": "planner", "messages": messages})
        assert answer.status == 400
        assert answer.error["code"] == "context_length_exceeded"

    check_nobody_waits(server, send)


def test_a_long_answer_is_written_beside_the_loop(tokenizer):
    engine = fake_engine(tokenizer, fake_config(max_model_len=2048))
    engine.tokens_per_event = 8
    script(engine, "x", end=False)
    with running_server(engine) as client:

        def send() -> None:
            answer = client.complete(n=4, max_tokens=2000, logprobs=10, stop=["y" * 1000] * 16)
            # Not decoded: that would hold this interpreter for longer than the server does.
            assert answer.body.count(b'"finish_reason":"length"') == 4
            assert b'"completion_tokens":8000' in answer.body

        # The engine of the tests works beside it; so this is of the loop's own thread.
        for _ in range(TRIES):
            before = own_lags(client)[1]
            send()
            if own_lags(client)[1] == before:
                return
        pytest.fail("the loop was held up each time")


def test_limits_are_the_operators(tokenizer):
    config = fake_config(max_n=2, max_prompts=3, max_body_items=1000)
    with running_server(fake_engine(tokenizer, config)) as client:
        assert client.complete(n=2).status == 200
        assert "between 1 and 2, got 3" in client.complete(n=3).error["message"]
        assert client.complete(["a"] * 3).status == 200
        assert "takes 3 a request" in client.complete(["a"] * 4).error["message"]
        error = client.complete(["a"] * 2000).error
        assert error["code"] == "too_many_items"
        assert "the server reads 1000" in error["message"]


@pytest.mark.parametrize(
    ("body", "items"),
    [
        (b'["a", "b"]', 3),
        (b'["\\"", "\\\\", "[[[[{{{{"]', 4),
        (b'{"a": {"b": []}}', 5),
        (b"[" + b",".join([b"1"] * 33) + b"]", 3),
        (b'["' + b"," * 1000 + b'"]', 2),
        (b'"' + b'"' * 1000, 500),
    ],
)
def test_what_a_body_holds_is_counted_undecoded(body, items):
    padded = body + b" " * 100
    check_items(padded, items)
    with pytest.raises(ApiError, match="the request body holds"):
        check_items(padded, items - 1)


def test_the_lag_is_a_metric(client):
    eventually(lambda: client.metric("pshare_event_loop_lag_seconds_count") > 0)
    assert client.metric("pshare_event_loop_max_lag_seconds") >= 0
    loop = client.server.service._bridge._loop
    loop.call_soon_threadsafe(time.sleep, 0.3)
    eventually(lambda: client.metric("pshare_event_loop_max_lag_seconds") > 0.2)


def test_work_of_its_own_is_told_from_waiting(client):
    loop = client.server.service._bridge._loop

    def work() -> None:
        end = time.thread_time() + 0.3
        while time.thread_time() < end:
            pass

    eventually(lambda: own_lags(client)[0] > 0)
    assert own_lags(client)[1] == 0
    loop.call_soon_threadsafe(work)
    eventually(lambda: own_lags(client)[1] == 1)


def own_lags(client: Client) -> tuple[float, float]:
    """How many there were, and how many of them were longer than they may be; at one time."""
    text = client.get("/metrics").body.decode()
    name = "pshare_event_loop_own_lag_seconds"
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(name))
    count = float(values[f"{name}_count"])
    return count, count - float(values[f'{name}_bucket{{le="{SECONDS}"}}'])
