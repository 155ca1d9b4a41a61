"""Meshes of several processes: `prefill.hosts` and `decode.hosts`, and what happens when one of
these processes ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from pshare_jax.engine.offline import Engine
from pshare_jax.serve.process import READY
from tests.e2e.conftest import write_config
from tests.e2e.metrics import eventually
from tests.e2e.test_cluster import SECONDS, Processes, Stream, body_of, knows_texts, read

pytestmark = pytest.mark.e2e

NUMBERS = (0, 1, 2, 3, 4, 5)
"""Of requests: greedy and seeded ones, of three models."""


def settings_of(folder: Path) -> dict[str, Any]:
    """Two devices for each mesh."""
    settings = yaml.safe_load(write_config(folder).read_text())
    settings["models"] = settings["models"][:3]
    settings["max_model_len"] = 256
    settings["kernel_backend"] = "xla"
    settings["prefill"] = {"chunk_buckets": [64], "tensor_parallel": 2}
    settings["decode"] = {
        "batch_buckets": [8],
        "max_num_seqs": 8,
        "replay_buckets": [16],
        "tensor_parallel": 2,
    }
    return settings


@pytest.fixture(scope="module")
def expected(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """What one process answers, whose meshes are as large."""
    path = tmp_path_factory.mktemp("one") / "serve.yaml"
    path.write_text(yaml.safe_dump(settings_of(tiny_folder)))
    texts = {}
    with Engine.from_config(path) as engine:
        for number in NUMBERS:
            body = body_of(number)
            sampling = {key: body[key] for key in ("temperature", "top_p", "seed", "ignore_eos")}
            (answer,) = engine.generate(
                body["model"], body["prompt"], max_tokens=body["max_tokens"], **sampling
            )
            texts[number] = answer.text
    assert len(set(texts.values())) == len(NUMBERS)
    return texts


class Gangs(Processes):
    """A launcher whose workers are gangs."""

    def member(self, name: str, rank: int) -> int | None:
        """The process of a worker that has a rank, if it runs."""
        children = Path(f"/proc/{self.launcher.pid}/task").glob("*/children")
        for child in {int(child) for file in children for child in file.read_text().split()}:
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{child}/cmdline").read_text().split("\0")
                if {f"--name={name}", f"--gang-rank={rank}"} <= set(command):
                    return child
        return None


@pytest.fixture(scope="module")
def gangs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gangs]:
    """A frontend, a prefill and a decode worker, each of these of two processes."""
    settings = settings_of(tiny_folder)
    settings["prefill"]["hosts"] = settings["decode"]["hosts"] = 2
    settings["cluster"] = {"launcher": "local", "lost_seconds": 10.0, "max_attempts": 40}
    path = tmp_path_factory.mktemp("gangs") / "serve.yaml"
    path.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "pshare_jax.serve", f"--config={path}", "--port=0"]
    # One device a process, whatever this one has.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        watchdog = threading.Timer(SECONDS, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            ready = next((line for line in process.stdout if line.startswith(READY)), "")
            watchdog.cancel()
            assert ready
            yield Gangs(process, [ready.removeprefix(READY).strip()])
        finally:
            watchdog.cancel()
            process.terminate()
            assert process.wait(SECONDS) == 0


def answers(gangs: Gangs) -> dict[int, str]:
    with ThreadPoolExecutor(len(NUMBERS)) as pool:
        streams = pool.map(lambda n: read(gangs.urls[0], body_of(n), Stream()), NUMBERS)
        return dict(zip(NUMBERS, [stream.text for stream in streams], strict=True))


@pytest.mark.slow
def test_two_processes_answer_what_one_does(gangs: Gangs, expected: dict[int, str]) -> None:
    assert answers(gangs) == expected
    # Pages have gone from the one mesh to the other, and nothing was compiled for it.
    assert gangs.metric("pshare_handoff_pages_total") > 0
    assert gangs.metric("pshare_compiles_total") == 0
    # The first process follows grammars, the other one does as it is told.
    assert [knows_texts(gangs.member("decode0", rank)) for rank in (0, 1)] == [True, False]


@pytest.mark.slow
def test_a_gang_ends_and_is_started_again_whole(gangs: Gangs, expected: dict[int, str]) -> None:
    """Whichever of its processes is killed, in mid-stream: the answer is the same."""
    for name, rank in (("decode0", 1), ("prefill0", 0)):
        before = [gangs.member(name, r) for r in (0, 1)]
        victim = before[rank]
        assert None not in before
        assert victim is not None
        killed = []

        def kill(so_far: Stream, victim: int = victim, killed: list[int] = killed) -> None:
            if len(so_far.ids) == 6 and not killed:
                killed.append(victim)
                os.kill(victim, signal.SIGKILL)

        assert read(gangs.urls[0], body_of(1), Stream(), kill).text == expected[1]
        assert killed
        eventually(lambda b=before, n=name: not {gangs.member(n, 0), gangs.member(n, 1)} & {*b}, 60)
        assert answers(gangs) == expected
        eventually(gangs.whole, SECONDS)
