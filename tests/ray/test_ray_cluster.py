"""`pshare serve --launcher=ray` with the tiny model, while its parts and those of Ray die."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from pshare_jax.serve.process import READY
from pshare_jax.serve.ray_host import _OWN
from tests.e2e.conftest import write_config
from tests.e2e.test_cluster import Stream, body_of, read
from tests.engine.harness import wait_until
from tests.ray.test_ray_host import OWN, alive, descendants

pytestmark = pytest.mark.ray

SECONDS = 200
NAME = f"ray{os.getpid()}"


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> Path:
    settings = yaml.safe_load(write_config(tiny_folder).read_text())
    settings["cluster"] = {"lost_seconds": 4.0, "ray": {"name": NAME}}
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@contextmanager
def launched(
    config: Path, port: int, *flags: str, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A launcher that has said that all are ready."""
    command = [sys.executable, "-m", "pshare_jax.serve", f"--config={config}", f"--port={port}"]
    with subprocess.Popen(
        [*command, "--launcher=ray", *flags], stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        watchdog = threading.Timer(SECONDS, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            assert any(line.startswith(READY) for line in process.stdout)
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield process
        finally:
            watchdog.cancel()
            if process.poll() is None:
                process.terminate()
                process.wait(SECONDS)


def processes_of(config: Path) -> dict[str, int]:
    """A cluster's workers and frontends, by name or port, whoever they belong to."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_text()
            # Not who waits for them.
            if f"--config={config}" in command and "serve.detached" not in command:
                told = re.search(r"--name=(\w+)", command)
                if told or "--listen-fd" in command:
                    found[told[1] if told else "frontend"] = int(path.parent.name)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_dies_is_not_missed(config: Path, tiny_server: str) -> None:
    """A worker, Ray's own processes, the launcher: answers are those of one process throughout."""
    expected = [read(tiny_server, body_of(n), Stream()).text for n in range(6)]
    port = free_port()
    url = f"http://127.0.0.1:{port}"

    def check() -> None:
        assert [read(url, body_of(n), Stream()).text for n in range(6)] == expected

    def whole() -> bool:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=SECONDS) as answer:
                return json.loads(answer.read())["status"] == "ok"
        except (OSError, urllib.error.URLError):
            return False

    with launched(config, port) as first:
        check()
        # A worker dies in the middle of a stream, and comes again at another address.
        killed: list[int] = []

        def kill(stream: Stream) -> None:
            if len(stream.ids) == 6 and not killed:
                killed.append(processes_of(config)["decode0"])
                os.kill(killed[0], signal.SIGKILL)

        assert read(url, body_of(5), Stream(), kill).text == expected[5]
        assert killed
        wait_until(lambda: processes_of(config).get("decode0") not in (None, *killed), SECONDS)
        wait_until(whole, SECONDS)
        check()
        # Ray's directory dies, then the launcher, and with it the Ray that was its own.
        before = processes_of(config)
        rays = descendants(first.pid)
        (gcs,) = (
            pid for pid in rays if "gcs_server" in Path(f"/proc/{pid}/cmdline").read_text()[:500]
        )
        os.kill(gcs, signal.SIGKILL)
        check()
        first.kill()
        first.wait()
        check()
        assert processes_of(config) == before
    # Another launcher: what is left of the first one is ended in good order, then replaced.
    with launched(config, port) as second:
        check()
        after = processes_of(config)
        assert after.keys() == before.keys()
        assert not any(alive(pid) for pid in before.values())
        second.terminate()
        assert second.wait(SECONDS) == 0
    wait_until(lambda: processes_of(config) == {}, SECONDS)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=SECONDS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_launcher_leaves_and_another_goes_on(config: Path, tmp_path: Path) -> None:
    """On a Ray of somebody else's; at last the host is drained."""
    (tmp_path / "token").write_text("a token that is long enough")
    (tmp_path / "token").chmod(0o600)
    env = {**os.environ, **_OWN, "RAY_AUTH_TOKEN": "0" * 64, "TMPDIR": str(tmp_path)}
    # Its paths must be short.
    env["RAY_TMPDIR"] = tempfile.gettempdir()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        [sys.executable, "-c", OWN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    ) as ray:
        assert ray.stdout is not None
        flags = (
            f"--cluster.ray_address={ray.stdout.readline().strip()}",
            f"--token-file={tmp_path / 'token'}",
            "--cluster.ray.keep=true",
            "--cluster.ray.frontend.cpus=0",
            "--cluster.ray.prefill.cpus=0",
            "--cluster.ray.decode.cpus=0",
        )
        with launched(config, port, *flags, env=env) as first:
            text = read(url, body_of(1), Stream()).text
            before = processes_of(config)
            first.terminate()
            assert first.wait(SECONDS) == 0
        assert processes_of(config) == before
        assert read(url, body_of(1), Stream()).text == text
        with launched(config, port, *flags, env=env) as second:
            assert processes_of(config) == before
            # It looks after them as if they were its own.
            os.kill(before["prefill0"], signal.SIGKILL)
            wait_until(
                lambda: processes_of(config).get("prefill0") not in (None, before["prefill0"]),
                SECONDS,
            )
            second.kill()
            second.wait()
        drain = [sys.executable, "-m", "pshare_jax.serve.ray_drain", "30"]
        done = subprocess.run(drain, env=env, capture_output=True, text=True, check=True)
        assert len(done.stdout.splitlines()) == 3
        assert processes_of(config) == {}
        ray.communicate("")
