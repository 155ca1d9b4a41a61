"""vLLM's OpenAI-compatible servers, one a model, for as long as a `with` block lasts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO

from pshare_jax.errors import BenchmarkError

READY_SECONDS = 600.0
LOG_LINES = 15
_MODULE = "vllm.entrypoints.openai.api_server"
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "passive"}
"""What serves several of them on one machine best. By default each binds its threads to all CPUs
but the last, so that on a machine of two all share one; and idle threads spin, on CPUs that the
other servers need."""


@dataclass(frozen=True)
class VllmServers:
    """Servers of vLLM to start, each with a model of its own.

    Args:
        python: an interpreter that has vLLM for CPUs installed.
        model: Hugging Face folder that every one serves; `convert export` makes one.
        preload: libraries that vLLM advises to load first (`LD_PRELOAD`): tcmalloc, libiomp5.
        kv_gib: memory for KV of each.
        args: further flags of each.
        environment: further variables of each, or other values of `ENVIRONMENT`.
    """

    python: str
    model: str
    preload: list[str] = field(default_factory=list)
    kv_gib: int = 1
    args: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


@contextmanager
def running_vllm(servers: VllmServers, count: int) -> Iterator[list[str]]:
    """Starts `count` servers on 127.0.0.1, one after the other; gives their URLs.

    Raises:
        BenchmarkError: one ended, or was not ready in time; with the end of its log.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(_server(servers, f"model{i}")) for i in range(count)]


@contextmanager
def _server(servers: VllmServers, name: str) -> Iterator[str]:
    port = _free_port()
    command = [servers.python, "-m", _MODULE, "--model", servers.model]
    command += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "bfloat16", "--enable-prompt-tokens-details", *servers.args]
    environment = os.environ | ENVIRONMENT | servers.environment
    environment["VLLM_TARGET_DEVICE"] = "cpu"
    environment["VLLM_CPU_KVCACHE_SPACE"] = str(servers.kv_gib)
    if servers.preload:
        environment["LD_PRELOAD"] = ":".join(servers.preload)
    with tempfile.TemporaryFile(mode="w+") as log:
        try:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        except OSError as error:
            raise BenchmarkError(
                f"vllm.python: {servers.python}: {error.strerror or error}"
            ) from None
        with process:
            try:
                _wait_until_ready(process, f"http://127.0.0.1:{port}", log)
                yield f"http://127.0.0.1:{port}"
            finally:
                # Its engine is a process of its own, which must not outlive it.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: IO[str]) -> None:
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
    raise BenchmarkError(f"a server of vLLM {how}\n{tail}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
