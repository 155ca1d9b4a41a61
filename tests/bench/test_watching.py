"""What the page costs is told by process, with somebody who watches and without."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys

import pytest

from pshare_jax.bench import watching
from pshare_jax.errors import BenchmarkError
from pshare_jax.text.tokenizer import Tokenizer
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import running_server
from tests.text.tiny import write_byte_level

OPTIONS = watching.WatchingOptions(
    model="planner", contexts=2, tokens=20, seconds=0.01, rounds=2, pause=0.0
)


@pytest.fixture
def server(tmp_path, monkeypatch):
    tokenizer = Tokenizer.load(write_byte_level(tmp_path))
    with running_server(fake_engine(tokenizer, fake_config(max_model_len=400))) as client:
        monkeypatch.setattr(
            watching, "running_server", lambda _: contextlib.nullcontext(client.url)
        )
        yield client


def test_parts_with_and_without_watchers_are_told_apart(server, monkeypatch):
    """A second of one process in each part, two of another one where somebody watches."""
    parts = iter([{"a": 0.0}, {"a": 1.0}, {"a": 1.0, "b": 5.0}, {"a": 2.0, "b": 7.0}] * 2)
    monkeypatch.setattr(watching, "processor_seconds", lambda root: next(parts))
    times = itertools.count(0.0, 10.0)
    monkeypatch.setattr(watching, "_now", lambda: next(times))
    result = watching.run(OPTIONS)
    assert result["cores"] == {"a": pytest.approx([0.1, 0.1]), "b": pytest.approx([0.0, 0.2])}
    assert result["events"] > 0
    assert result["bytes"] > result["events"]
    assert len(server.engine.submitted) == 2 + 2 * 2
    table = watching.lines(result)
    assert table[1:3] == [
        "a   10.00 %   10.00 %   +0.00 %",
        "b    0.00 %   20.00 %  +20.00 %",
    ]


def test_a_page_that_is_turned_off_is_no_result(server, monkeypatch):
    monkeypatch.setattr(watching, "_watch", _refused)
    with pytest.raises(BenchmarkError, match="404"):
        watching.run(OPTIONS)


async def _refused(http, seen) -> None:
    raise BenchmarkError("/ui/events: 404: off")


def test_processes_are_known_by_name():
    """Children of children, too; who has ended is left out."""
    sleeps = "import time; print(0, flush=True); time.sleep(60)"
    starts = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleeps!r}, "
        "'--name=decode0', '--cluster.workers=[]']).wait()"
    )
    with subprocess.Popen([sys.executable, "-c", starts], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = watching.processor_seconds(os.getpid())
        for child in watching._children(process.pid):
            os.kill(child, 9)
    assert {"server", "decode0"} <= found.keys()
    assert found["decode0"] >= 0.0
