"""Processes: `pshare serve --launcher=local`, and what happens when any of them ends or hangs."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from pshare_jax.serve.process import READY
from tests.e2e.conftest import FEW, write_config
from tests.e2e.metrics import eventually
from tests.serve.test_resume_apis import stream_of, told

pytestmark = pytest.mark.e2e

SECONDS = 200
MODELS = ("planner", "coder", "critic")
CHAOS = int(os.environ.get("CHAOS_REQUESTS", "24"))
"""Requests of the random attack; `make chaos` has a thousand."""

TOKENS = 24 if CHAOS <= 100 else 64
"""Of an answer; more of them die in the middle if they are long."""

REPORT = os.environ.get("CHAOS_REPORT", "")
"""File that the figures of the random attack are written to."""

PROMPTS = [f"{word} and on it goes " * 3 for word in ("red", "green", "blue", "grey")]


CHAT = [{"role": "user", "content": PROMPTS[1]}]
OTHER_APIS: dict[str, dict[str, Any]] = {
    "/v1/messages": {"model": "coder", "max_tokens": 40, "messages": CHAT, "temperature": 1.0},
    "/v1/responses": {"model": "critic", "input": PROMPTS[2], "max_output_tokens": 40},
    "/v1/fanout": {"model": MODELS, "messages": CHAT, "n": 2, "max_tokens": 20},
    "/v1/completions": {"model": "planner", "prompt": PROMPTS[3], "n": 20, "max_tokens": 8},
    "/v1/chat/completions": {
        "model": "planner",
        "messages": CHAT,
        "max_tokens": 24,
        "structured_outputs": {"regex": "(yes|no|maybe)( (yes|no))*"},
    },
}
"""Answers without a seed: what they are depends on their ids."""


@dataclass
class Stream:
    """What a client has got of a streamed completion."""

    text: str = ""
    last: str | None = None
    reason: str | None = None
    done: bool = False
    ids: list[str] = field(default_factory=list)


def body_of(number: int, max_tokens: int = TOKENS) -> dict[str, Any]:
    seeded = number % 2
    return {
        "model": MODELS[number % 3],
        "prompt": PROMPTS[number % 4] + "x" * (number % 7),
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "temperature": 1.0 * seeded,
        "top_p": 0.9,
        "seed": number % 84,
        "repetition_penalty": 1.2 if number % 7 == 3 else 1.0,
    }


def body_in_chaos(number: int) -> tuple[dict[str, Any], int]:
    """A request, and the number of its expected answer; some follow a grammar."""
    return (grammar_body(1), -1) if number % 12 == 7 else (body_of(number), number)


def read(
    url: str,
    body: dict[str, Any],
    stream: Stream,
    each: Callable[[Stream], None] = lambda stream: None,
) -> Stream:
    """Reads a stream to its end, from where it was left; `each` is called after each event."""
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    if stream.last is not None:
        request.add_header("Last-Event-ID", stream.last)
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        for line in answer:
            if line.startswith(b"id: "):
                stream.last = line[4:].decode().strip()
                stream.ids.append(stream.last)
            elif line.startswith(b"data: [DONE]"):
                stream.done = True
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                assert "error" not in event, event
                for choice in event["choices"]:
                    assert stream.reason is None, "an event came after the last one"
                    stream.text += choice["text"]
                    stream.reason = choice["finish_reason"]
            each(stream)
    assert stream.done
    return stream


@pytest.fixture(scope="module")
def config(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of the tiny server, in processes."""
    settings = yaml.safe_load(write_config(tiny_folder, **FEW).read_text())
    settings["prefill"]["engines"] = settings["decode"]["engines"] = 2
    settings["cluster"] = {
        "frontends": 2,
        "lost_seconds": 4.0,
        "max_attempts": 40,
        "transport": os.environ.get("CHAOS_TRANSPORT", "auto"),
    }
    path = tmp_path_factory.mktemp("cluster") / "serve.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def grammar_body(number: int) -> dict[str, Any]:
    return {**body_of(number), "structured_outputs": {"regex": "(yes|no|maybe)( (yes|no))*"}}


@pytest.fixture(scope="module")
def expected(tiny_server: str) -> Callable[[int], str]:
    """The answers of one process; those of negative numbers follow a grammar."""
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda n: read(tiny_server, body_of(n), Stream()).text, range(84)))
    grammar = read(tiny_server, grammar_body(1), Stream()).text
    assert len(set(texts)) > 60
    return lambda number: grammar if number < 0 else texts[number % 84]


class Processes:
    """A running launcher."""

    def __init__(self, process: subprocess.Popen[str], urls: list[str]):
        self.launcher = process
        self.urls = urls

    def pid(self, name: str) -> int | None:
        """Of the child that goes by a name now; frontends are told by their place."""
        pid = self.launcher.pid
        children = Path(f"/proc/{pid}/task").glob("*/children")
        found = {int(child) for file in children for child in file.read_text().split()}
        frontends = {}
        for child in found:
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{child}/cmdline").read_text().split("\0")
                if f"--name={name}" in command:
                    return child
                # One that is being started has the launcher's own command for a moment.
                if "pshare_jax.serve" in command and command[-2].startswith("--listen-fd="):
                    # Their sockets were made in this order.
                    frontends[int(command[-2].removeprefix("--listen-fd="))] = child
        wanted = sorted(frontends)
        return frontends[wanted[int(name[-1])]] if name.startswith("frontend") else None

    def send(self, name: str, number: int) -> int:
        """Sends a signal to a child that is there; its process id."""
        eventually(lambda: self.pid(name) is not None, SECONDS)
        pid = self.pid(name)
        assert pid is not None
        os.kill(pid, number)
        return pid

    def health(self, url: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"{url}/health", timeout=SECONDS) as answer:
            return json.loads(answer.read())

    def metric(self, name: str, label: str = "") -> float:
        """The sum of a metric's series, of those with a label, at the first frontend."""
        with urllib.request.urlopen(f"{self.urls[0]}/metrics", timeout=SECONDS) as answer:
            lines = answer.read().decode().splitlines()
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith((f"{name}{{", f"{name} ")) and label in line
        )

    def whole(self) -> bool:
        """Whether all frontends answer, and are linked to all workers."""
        with contextlib.suppress(OSError, urllib.error.URLError):
            return all(self.health(url)["status"] == "ok" for url in self.urls)
        return False


def knows_texts(pid: int | None) -> bool:
    """Whether a process has loaded what tokenizers are made of."""
    return "/tokenizers" in Path(f"/proc/{pid}/maps").read_text()


@pytest.fixture(scope="module")
def processes(config: Path, expected: object) -> Iterator[Processes]:
    """2 frontends, 2 prefill and 2 decode workers."""
    command = [sys.executable, "-m", "pshare_jax.serve", f"--config={config}", "--port=0"]
    with subprocess.Popen(
        [*command, "--launcher=local"], stdout=subprocess.PIPE, text=True
    ) as process:
        watchdog = threading.Timer(280, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            urls = []
            for line in process.stdout:
                if line.startswith(READY):
                    urls.append(line.removeprefix(READY).strip())
                if len(urls) == 2:
                    break
            watchdog.cancel()
            assert len(urls) == 2
            yield Processes(process, urls)
        finally:
            watchdog.cancel()
            process.send_signal(signal.SIGCONT)
            process.terminate()
            assert process.wait(SECONDS) == 0


@pytest.mark.slow
def test_what_processes_answer_is_what_one_does(
    processes: Processes, expected: Callable[[int], str]
) -> None:
    with ThreadPoolExecutor(8) as pool:
        texts = list(
            pool.map(lambda n: read(processes.urls[n % 2], body_of(n), Stream()).text, range(24))
        )
    assert texts == [expected(n) for n in range(24)]
    assert read(processes.urls[1], grammar_body(1), Stream()).text == expected(-1)
    # Pages have come from other processes, and nothing was compiled for it.
    assert processes.metric("pshare_handoff_pages_total") > 0
    assert processes.metric("pshare_compiles_total") == 0
    # Who covers prompts has no use for texts; who generates follows grammars.
    assert not knows_texts(processes.pid("prefill0"))
    assert knows_texts(processes.pid("decode0"))


@pytest.mark.slow
def test_a_frontend_is_killed_in_mid_stream(
    processes: Processes, expected: Callable[[int], str]
) -> None:
    """Clients go on with the other one, by every API: the same answers, nothing twice."""
    stream = Stream()
    one, other = (int(url.rpartition(":")[2]) for url in processes.urls)
    begun = {path: stream_of(one, path, body, cut=5) for path, body in OTHER_APIS.items()}
    body = body_of(5)
    killed = []

    def kill(so_far: Stream) -> None:
        if len(so_far.ids) == 6 and not killed:
            killed.append(processes.send("frontend0", signal.SIGKILL))

    # What was on its way when it died may still come, and so may the end.
    with contextlib.suppress(OSError, http.client.HTTPException, AssertionError):
        read(processes.urls[0], body, stream, kill)
    assert killed
    if not stream.done:
        read(processes.urls[1], body, stream)
    assert stream.text == expected(5)
    assert len(set(stream.ids)) == len(stream.ids)
    for path, other_body in OTHER_APIS.items():
        got = begun[path] + stream_of(other, path, other_body, begun[path][-1][0])
        assert len({id for id, _, _ in got}) == len(got)
        first = got[0]
        assert told([first, *stream_of(other, path, other_body, first[0])]) == told(got)
    eventually(processes.whole, SECONDS)
    assert read(processes.urls[0], body, Stream()).text == expected(5)


@pytest.mark.slow
def test_a_launcher_that_stands_still_is_not_missed(
    processes: Processes, expected: Callable[[int], str]
) -> None:
    processes.launcher.send_signal(signal.SIGSTOP)
    try:
        for number in range(6):
            url = processes.urls[number % 2]
            assert read(url, body_of(number), Stream()).text == expected(number)
    finally:
        processes.launcher.send_signal(signal.SIGCONT)
    eventually(processes.whole, SECONDS)


WORKERS = ("prefill0", "prefill1", "decode0", "decode1")
KINDS = (signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP)
FIRST = (
    ("decode1", signal.SIGKILL),
    ("prefill0", signal.SIGKILL),
    ("decode0", signal.SIGSTOP),
)
"""Who is killed or stopped, one after the other; in the long attack others follow."""


class Attack:
    """Kills and stops workers; `done` has `(name, signal)` of each."""

    def __init__(self, processes: Processes):
        self.done: list[tuple[str, int]] = []
        self._processes = processes

    def strike(self, name: str, kind: int) -> None:
        pid = self._processes.send(name, kind)
        self.done.append((name, kind))
        if kind == signal.SIGSTOP:
            # Longer than `lost_seconds`.
            time.sleep(5.0)
            os.kill(pid, signal.SIGCONT)

    def go_on(self, over: threading.Event) -> None:
        """Every 2 s a random worker, until it is over; of each side one at a time is away."""
        rng = random.Random(2)
        while not over.wait(2.0):
            away = max(self._away(url) for url in self._processes.urls)
            latest = self.done[-1][0][:-1]
            names = [name for name in WORKERS if not away or not name.startswith(latest)]
            if away < 2:
                self.strike(rng.choice(names), rng.choice(KINDS))

    def _away(self, url: str) -> int:
        return len(self._processes.health(url).get("failed_workers", ()))


@pytest.mark.slow
def test_requests_while_workers_die_and_hang(
    processes: Processes, expected: Callable[[int], str]
) -> None:
    """Every stream ends with the text of one process; there are streams until all was done."""
    struck, over = threading.Event(), threading.Event()
    numbers, attack = itertools.count(), Attack(processes)
    started = time.monotonic()

    def strike() -> None:
        try:
            for name, kind in FIRST:
                attack.strike(name, kind)
                time.sleep(0.3)
            if CHAOS > 100:
                attack.go_on(over)
        finally:
            struck.set()

    def play() -> list[tuple[int, Stream, str]]:
        done = []
        while (number := next(numbers)) < CHAOS or not (CHAOS > 100 or struck.is_set()):
            stream, error = Stream(), ""
            try:
                read(processes.urls[number % 2], body_in_chaos(number)[0], stream)
            except (OSError, http.client.HTTPException, AssertionError) as failure:
                error = repr(failure)
            done.append((number, stream, error))
        return done

    with ThreadPoolExecutor(7) as pool:
        attacker = pool.submit(strike)
        players = [pool.submit(play) for _ in range(6)]
        try:
            streams = [stream for player in players for stream in player.result()]
        finally:
            over.set()
        attacker.result()
    told_all = [(number, stream) for number, stream, error in streams if not error]
    report: dict[str, Any] = {
        "requests": len(streams),
        "seconds": round(time.monotonic() - started, 1),
        "kills": sum(kind == signal.SIGKILL for _, kind in attack.done),
        "stops": sum(kind == signal.SIGSTOP for _, kind in attack.done),
        "failed": [(number, error) for number, _, error in streams if error],
        "different": [n for n, s in told_all if s.text != expected(body_in_chaos(n)[1])],
        "cut short": [n for n, stream in told_all if stream.reason is None],
        "an event twice": [n for n, stream, _ in streams if len({*stream.ids}) < len(stream.ids)],
    }
    if REPORT:
        Path(REPORT).write_text(json.dumps(report, indent=2))
    assert report["requests"] >= CHAOS
    for what in ("failed", "different", "cut short", "an event twice"):
        assert report[what] == [], what
    eventually(processes.whole, SECONDS)
    # Nobody holds a page of the pools.
    eventually(lambda: processes.metric("pshare_pages", 'state="used"') == 0, SECONDS)


@pytest.mark.slow
def test_processes_are_replaced_and_nobody_notices(
    processes: Processes, expected: Callable[[int], str]
) -> None:
    """One, as `make test` does it, or all, as `make chaos` does."""
    eventually(processes.whole, SECONDS)
    names = ["prefill0", "prefill1", "decode0", "decode1"] if CHAOS > 100 else ["decode1"]
    before = {name: processes.pid(name) for name in names}
    if CHAOS > 100:
        processes.launcher.send_signal(signal.SIGHUP)
    else:
        processes.send("decode1", signal.SIGTERM)
    number = 0
    while any(processes.pid(name) in (None, before[name]) for name in names):
        # By the frontend that is replaced last, and may have to wait for a worker.
        assert read(processes.urls[1], body_of(number), Stream()).text == expected(number)
        number += 1
    eventually(processes.whole, SECONDS)
