"""Processes with a KV store, pages that go from device to device, and what comes and goes: modules,
and decode workers with the load."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pshare_jax.serve.process import READY
from tests.e2e.conftest import FEW, write_config
from tests.e2e.metrics import eventually
from tests.e2e.test_cluster import MODELS, SECONDS, Processes, Stream, body_of, read
from tests.e2e.test_examples import run

pytestmark = pytest.mark.e2e

NUMBERS = range(9)
LONG = 100
"""Tokens of an answer while workers come and go."""

SCALED = {
    "lost_seconds": 10.0,
    "autoscale": {
        "max_decode": 2,
        "observe_seconds": 0.2,
        "prefill_tokens_per_s": 1e6,
        "decode_sequences": 4,
        "window": 1.0,
        "long_window": 1.0,
        "rise_seconds": 0.5,
        "fall_seconds": 2.0,
        "settle_seconds": 1.0,
    },
}
"""Up to two decode workers: one for four sequences, whatever comes."""


@pytest.fixture(scope="module")
def processes(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """2 frontends, a prefill and a decode worker; a second one while four sequences run."""
    config = write_config(tiny_folder, cluster=SCALED, **FEW)
    command = [sys.executable, "-m", "pshare_jax.serve", f"--config={config}"]
    command += ["--port=0", "--launcher=local", "--cluster.frontends=2"]
    command += ["--cluster.transport=jax-transfer", "--kv_store.bytes=67108864"]
    command += [f"--kv_store.path={tmp_path_factory.mktemp('store') / 'pool'}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
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
            process.terminate()
            assert process.wait(SECONDS) == 0


def post(url: str, path: str, **body: Any) -> tuple[int, str]:
    request = urllib.request.Request(
        f"{url}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def models(url: str) -> list[str]:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=SECONDS) as answer:
        return [model["id"] for model in json.loads(answer.read())["data"]]


def texts(url: str) -> list[str]:
    return [read(url, body_of(number), Stream()).text for number in NUMBERS]


@pytest.fixture(scope="module")
def expected(tiny_server: str) -> list[str]:
    return texts(tiny_server)


@pytest.mark.slow
def test_pages_go_from_device_to_device(processes: Processes, expected: list[str]) -> None:
    assert texts(processes.urls[0]) == expected
    # Whatever fails goes by file, and the machine may be busy.
    eventually(lambda: processes.metric("pshare_transfers_total", "jax-transfer") > 0, SECONDS)


@pytest.mark.slow
def test_the_example_goes_on_at_another_frontend(processes: Processes) -> None:
    """Its answers are those that it gets when nothing breaks."""
    first, second = processes.urls
    options = ["--urls", first, second, "--models", *MODELS, "--max-tokens=12"]
    pattern = r"(\w+): (\d+) of (\d+) prompt tokens from another model, 12 tokens by (.*?): (.*)"
    broken, whole = (
        [re.fullmatch(pattern, line).groups() for line in run("cluster.py", *more).splitlines()]  # type: ignore[union-attr]
        for more in ([*options, "--break-after=3"], options)
    )
    assert [row[0] for row in broken] == [row[0] for row in whole] == list(MODELS)
    assert [row[4] for row in broken] == [row[4] for row in whole]
    assert [row[3] for row in broken] == [f"{first}, {second}"] * 3
    assert [row[3] for row in whole] == [first, second, first]
    # Each model reads what the one before has computed, at whichever frontend that was.
    assert all(int(row[1]) >= int(before[2]) - 1 for before, row in itertools.pairwise(broken))


@pytest.mark.slow
def test_a_prefill_worker_that_starts_again_finds_the_pool(
    processes: Processes, expected: list[str]
) -> None:
    """Whether it then fetches or computes is a matter of prices; counters do not fall."""
    assert texts(processes.urls[0]) == expected
    eventually(lambda: processes.metric("pshare_store_slots", 'state="ready"') > 0, SECONDS)
    pid = processes.send("prefill0", signal.SIGKILL)
    eventually(lambda: processes.pid("prefill0") not in (None, pid), SECONDS)
    assert texts(processes.urls[1]) == expected
    eventually(processes.whole, SECONDS)
    eventually(lambda: processes.metric("pshare_store_slots", 'state="ready"') > 0, SECONDS)
    assert processes.metric("pshare_store_stored_total") > 0
    assert processes.metric("pshare_compiles_total") == 0


@pytest.mark.slow
def test_a_module_is_loaded_at_one_frontend_and_served_by_all(
    processes: Processes, expected: list[str]
) -> None:
    """By a decode worker that was killed meanwhile, too."""
    first, second = processes.urls
    body = {**body_of(2), "model": "new"}
    assert body_of(2)["model"] == "critic"
    status, said = post(first, "load_lora_adapter", lora_name="new", lora_path="critic")
    assert (status, said) == (200, "Success: LoRA adapter 'new' added successfully.")
    eventually(lambda: "new" in models(second), SECONDS)
    assert read(second, body, Stream()).text == expected[2]
    pid = processes.send("decode0", signal.SIGKILL)
    eventually(lambda: processes.pid("decode0") not in (None, pid), SECONDS)
    assert read(first, body, Stream()).text == expected[2]
    status, said = post(first, "load_lora_adapter", lora_name="base", lora_path="base")
    assert status == 400
    assert "invalid_module" in said
    status, said = post(second, "unload_lora_adapter", lora_name="new")
    assert status == 200
    eventually(lambda: "new" not in models(first), SECONDS)
    with contextlib.suppress(urllib.error.HTTPError):
        read(first, body, Stream())
        raise AssertionError("what was unloaded has answered")
    assert texts(first) == expected


@pytest.mark.slow
def test_a_decode_worker_comes_and_goes(processes: Processes, tiny_server: str) -> None:
    """The launcher adds it and drains it again, while there are requests all along."""
    bodies = [body_of(number, LONG) for number in range(6)]
    expected = [read(tiny_server, body, Stream()).text for body in bodies]
    url, numbers = processes.urls[0], itertools.count()
    done: list[tuple[int, str]] = []
    few, over = threading.Event(), threading.Event()

    def play(stays: bool) -> None:
        while not (over if stays else few).is_set():
            number = next(numbers) % 6
            done.append((number, read(url, bodies[number], Stream()).text))

    def pages(name: str) -> float:
        return processes.metric("pshare_pages", f'pool="{name}"')

    def failed() -> float:
        return processes.metric("vllm:request_success_total", 'finished_reason="error"')

    failed_before = failed()
    with ThreadPoolExecutor(6) as pool:
        players = [pool.submit(play, player == 0) for player in range(6)]
        try:
            # It comes, and what it has generated is of some use.
            eventually(lambda: pages("decode1") > 0, SECONDS)
            eventually(
                lambda: processes.metric("pshare_busy_seconds_total", 'engine="decode1"') > 0,
                SECONDS,
            )
            pid = processes.pid("decode1")
            few.set()
            # It goes, while one client goes on.
            eventually(lambda: pages("decode1") == 0, SECONDS)
            eventually(lambda: processes.pid("decode1") is None, SECONDS)
            count = len(done)
            eventually(lambda: len(done) > count + 3, SECONDS)
        finally:
            few.set()
            over.set()
        for player in players:
            player.result()
    assert pid is not None
    assert [text for _, text in done] == [expected[number] for number, _ in done]
    eventually(processes.whole, SECONDS)
    assert processes.pid("decode0") is not None
    # Nobody has failed, and the one that stayed is the one that there was.
    assert failed() == failed_before
    assert processes.metric("pshare_compiles_total") == 0
