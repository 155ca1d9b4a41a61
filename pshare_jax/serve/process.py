"""A server in a process of its own, for as long as a `with` block lasts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import IO

from pshare_jax.errors import EngineDeadError
from pshare_jax.tied import tied

SERVE = (sys.executable, "-m", "pshare_jax.serve")
READY = "pshare_jax: ready at "
STOP_SECONDS = 20.0
LOG_LINES = 15


@contextmanager
def running_server(
    args: Sequence[str],
    ready_seconds: float = 600.0,
    program: Sequence[str] = SERVE,
    checkout: str | None = None,
) -> Generator[str]:
    """Runs a server on a free port of 127.0.0.1; gives its URL once it is ready.

    On Linux it ends with this process, however that ends, so it is started in a thread that lives
    as long. A cluster that it launches ends with it.

    Args:
        args: its flags.
        ready_seconds: after which it is given up.
        program: what takes the flags.
        checkout: folder of the code that is run, and in which it runs, if it is not this code.

    Raises:
        EngineDeadError: see `server_process`.
    """
    with server_process(args, ready_seconds, program, checkout) as (url, _):
        yield url


@contextmanager
def server_process(
    args: Sequence[str],
    ready_seconds: float = 600.0,
    program: Sequence[str] = SERVE,
    checkout: str | None = None,
) -> Generator[tuple[str, subprocess.Popen[str]]]:
    """The same, and the process.

    Raises:
        EngineDeadError: it ended, or was not ready in time; with the end of its log.
    """
    command = [*program, "--port=0", *args]
    there = None if checkout is None else os.environ | {"PYTHONPATH": os.path.abspath(checkout)}
    with (
        tempfile.TemporaryFile(mode="w+") as log,
        subprocess.Popen(
            tied(command), stdout=subprocess.PIPE, stderr=log, text=True, cwd=checkout, env=there
        ) as process,
    ):
        try:
            yield _wait_until_ready(process, log, ready_seconds), process
        finally:
            _end(process)


def _wait_until_ready(process: subprocess.Popen[str], log: IO[str], seconds: float) -> str:
    watchdog = threading.Timer(seconds, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(READY):
                return line.removeprefix(READY).strip()
    finally:
        watchdog.cancel()
    log.seek(0)
    tail = "".join(log.readlines()[-LOG_LINES:])
    raise EngineDeadError(f"the server ended with code {process.wait()}:\n{tail}")


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
