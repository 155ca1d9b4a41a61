"""The launcher adds a decode worker and drains it again, while there are requests all along."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from pshare_jax.serve.process import READY
from tests.e2e.conftest import FEW, write_config
from tests.e2e.metrics import eventually
from tests.e2e.test_cluster import SECONDS, Processes, Stream, body_of, read

TOKENS = 100


@pytest.fixture(scope="module")
def processes(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """One of each, and up to two decode workers: one for four sequences, whatever comes."""
    settings = yaml.safe_load(write_config(tiny_folder, **FEW).read_text())
    settings["cluster"] = {
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
    path = tmp_path_factory.mktemp("scaling") / "serve.yaml"
    path.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "pshare_jax.serve", f"--config={path}", "--port=0"]
    with subprocess.Popen(
        [*command, "--launcher=local"], stdout=subprocess.PIPE, text=True
    ) as process:
        watchdog = threading.Timer(SECONDS, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            url = next(line for line in process.stdout if line.startswith(READY))
            watchdog.cancel()
            yield Processes(process, [url.removeprefix(READY).strip()])
        finally:
            watchdog.cancel()
            process.terminate()
            assert process.wait(SECONDS) == 0


@pytest.mark.slow
def test_a_decode_worker_comes_and_goes(processes: Processes, tiny_server: str) -> None:
    bodies = [body_of(number, TOKENS) for number in range(6)]
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
    assert processes.metric("vllm:request_success_total", 'finished_reason="error"') == 0
    assert processes.metric("pshare_compiles_total") == 0
