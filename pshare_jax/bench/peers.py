"""Servers of other projects, each for as long as a `with` block lasts."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO

from pshare_jax.errors import BenchmarkError
from pshare_jax.tied import tied

READY_SECONDS = 600.0
LOG_LINES = 15


@contextmanager
def running_peer(
    what: str, command: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Starts a server that answers `/health` with 200 once it is ready; gives its URL.

    Args:
        what: it is called in errors; the program's option and name.
        command: to which `--host` and `--port` are added.
        environment: variables beside those of this process.

    Raises:
        BenchmarkError: it cannot be started, ended, or was not ready in time; with the end of
            its log.
    """
    port = _free_port()
    there = os.environ | (environment or {})
    if shutil.which(command[0], path=there.get("PATH")) is None:
        raise BenchmarkError(f"{what}: {command[0]}: {os.strerror(errno.ENOENT)}")
    with tempfile.TemporaryFile(mode="w+") as log:
        process = subprocess.Popen(
            tied([*command, "--host", "127.0.0.1", "--port", str(port)]),
            stdout=log,
            stderr=log,
            env=there,
            start_new_session=True,
        )
        with process:
            try:
                _wait_until_ready(what, process, f"http://127.0.0.1:{port}", log)
                yield f"http://127.0.0.1:{port}"
            finally:
                # Its engine may be a process of its own, which must not outlive it.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _wait_until_ready(what: str, process: subprocess.Popen[bytes], url: str, log: IO[str]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    log.seek(0)
    tail = "".join(log.readlines()[-LOG_LINES:])
    how = "was not ready in time" if process.poll() is None else f"ended: {process.returncode}"
    raise BenchmarkError(f"{what}: the server {how}\n{tail}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
