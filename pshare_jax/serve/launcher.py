"""`pshare serve --launcher=local`: workers and frontends as processes of this machine.

The launcher listens on every address itself and hands the sockets to its children, so a child that
is started again is found where the former was, and who connects meanwhile waits. It is on nobody's
way: when it dies, the children go on.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from pshare_jax.cluster.tls import cluster_tls
from pshare_jax.config import ServeConfig
from pshare_jax.errors import ConfigError
from pshare_jax.serve.lifecycle import bind, url_of
from pshare_jax.serve.logs import say
from pshare_jax.serve.process import READY
from pshare_jax.serve.worker import READY as WORKER_READY

log = logging.getLogger(__name__)

AGAIN_SECONDS, MAX_AGAIN_SECONDS = 0.25, 5.0
"""Before a child that has ended is started again; twice as long each time it ends early."""

EARLY_SECONDS = 20.0
"""A child that ends sooner after it was ready has ended early."""

HEALTH_SECONDS = 1.0
"""Between two looks at a worker's health."""

HANGS = 20
"""Looks in a row that find no health, after which a worker is killed and started again."""

END_SECONDS = 5.0
"""How much longer than it drains a child may take to end."""

BAD_CONFIG = 2
"""Exit code of a child that would end so again and again."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A child: what to run, on which socket, and by which line it says that it is ready."""

    name: str
    command: tuple[str, ...]
    socket: socket.socket
    ready: str
    health: str = ""
    tls: ssl.SSLContext | None = None


class Child:
    """A process that is started again when it ends.

    Args:
        plan: what to run.
        drain_seconds: that it takes to end in good order, at most.

    Attributes:
        is_ready: set while it says that it is ready.
        gave_up: set when it ended so that it would end so again; also once it was stopped.
    """

    def __init__(self, plan: Plan, drain_seconds: float):
        self.plan = plan
        self.is_ready = threading.Event()
        self.gave_up = threading.Event()
        self.code = 0
        self._drain_seconds = drain_seconds
        self._stopping = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._run, name=plan.name, daemon=True)

    def start(self) -> None:
        """Starts it, and looks after it from now on."""
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def restart(self) -> None:
        """Ends it in good order and waits until the next one is ready."""
        self.is_ready.clear()
        self._end()
        while not self.is_ready.wait(0.1):
            if self.gave_up.is_set():
                return

    def stop(self) -> None:
        """Ends it in good order; blocks."""
        self._stopping.set()
        self._end()
        self._thread.join()

    def _end(self) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(self._drain_seconds + END_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("%s does not end: killing it", self.plan.name)
            process.kill()
            process.wait()

    def _run(self) -> None:
        seconds = AGAIN_SECONDS
        while not self._stopping.is_set():
            started = self._once()
            if self._stopping.is_set() or self.code == BAD_CONFIG:
                break
            log.warning("%s has ended with code %s: starting it again", self.plan.name, self.code)
            early = started is None or time.monotonic() - started < EARLY_SECONDS
            seconds = min(2 * seconds, MAX_AGAIN_SECONDS) if early else AGAIN_SECONDS
            self._stopping.wait(seconds)
        self.gave_up.set()

    def _once(self) -> float | None:
        """Runs it to its end; when it was ready, by the monotonic clock."""
        fd = self.plan.socket.fileno()
        with subprocess.Popen(
            [*self.plan.command, f"--listen-fd={fd}"],
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(fd,),
        ) as process:
            self._process = process
            if self._stopping.is_set():
                process.terminate()
            ready = None
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(self.plan.ready):
                    ready = time.monotonic()
                    self.is_ready.set()
                    if self.plan.health:
                        threading.Thread(target=self._watch, args=(process,), daemon=True).start()
            self.code = process.wait()
        self.is_ready.clear()
        return ready

    def _watch(self, process: subprocess.Popen[str]) -> None:
        """Kills it when it does not get on any more."""
        missed = 0
        while process.poll() is None and missed < HANGS:
            time.sleep(HEALTH_SECONDS)
            missed = 0 if _is_healthy(self.plan) else missed + 1
        if process.poll() is None:
            log.warning("%s hangs: killing it", self.plan.name)
            process.kill()


def _is_healthy(plan: Plan) -> bool:
    try:
        with urllib.request.urlopen(
            plan.health, timeout=HEALTH_SECONDS, context=plan.tls
        ) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


class Launcher:
    """All processes of a cluster on this machine.

    Args:
        config: the serving configuration.
        args: the flags that it came from, which the children get, too.
        folder: for the token file.

    Raises:
        ConfigError: an address that cannot be had, or certificates that cannot be used.
    """

    def __init__(self, config: ServeConfig, args: Sequence[str], folder: Path):
        tls = cluster_tls(config.cluster)
        self._tls = tls.client if tls else None
        token_file = folder / "token"
        token_file.touch(mode=0o600)
        token_file.write_text(secrets.token_urlsafe(32))
        args = [*args, "--cluster.launcher=none", f"--cluster.token_file={token_file}"]
        self._sockets: list[socket.socket] = []
        seconds = config.server.drain_seconds
        names = [f"prefill{i}" for i in range(config.prefill.engines)]
        names += [f"decode{i}" for i in range(config.decode.engines)]
        self.workers = [Child(self._worker(name, args), seconds) for name in names]
        sockets = [child.plan.socket for child in self.workers]
        addresses = ["{}:{}".format(*sock.getsockname()[:2]) for sock in sockets]
        args.append(f"--cluster.workers={json.dumps(addresses)}")
        self.frontends = [
            Child(self._frontend(i, config, args), seconds) for i in range(config.cluster.frontends)
        ]
        scheme = "https" if config.server.tls_cert else "http"
        self.urls = [url_of(child.plan.socket, scheme) for child in self.frontends]

    @property
    def children(self) -> list[Child]:
        """All processes."""
        return [*self.workers, *self.frontends]

    def start(self) -> None:
        """Starts all of them; they become ready by and by."""
        for child in self.children:
            child.start()

    def restart(self) -> None:
        """Replaces one of each side at a time; requests go on, or wait."""
        sides: dict[str, list[Child]] = {}
        for child in self.workers:
            sides.setdefault(child.plan.name.rstrip("0123456789"), []).append(child)
        groups = [[c for c in group if c] for group in itertools.zip_longest(*sides.values())]
        for group in (*groups, *([frontend] for frontend in self.frontends)):
            log.info("replacing %s", ", ".join(child.plan.name for child in group))
            _at_once([child.restart for child in group])

    def stop(self) -> None:
        """Ends all in good order: frontends first, since these need the workers."""
        for group in (self.frontends, self.workers):
            _at_once([child.stop for child in group])
        for sock in self._sockets:
            sock.close()

    def _worker(self, name: str, args: Sequence[str]) -> Plan:
        sock = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._sockets.append(sock)
        role = name.rstrip("0123456789")
        command = (sys.executable, "-m", "pshare_jax.serve.worker", f"--role={role}")
        health = f"{url_of(sock, 'https' if self._tls else 'http')}/health"
        command = (*command, f"--name={name}", *args)
        return Plan(name, command, sock, WORKER_READY, health, self._tls)

    def _frontend(self, index: int, config: ServeConfig, args: Sequence[str]) -> Plan:
        server = config.server
        port = server.port + index if server.port else 0
        sock = bind(dataclasses.replace(server, port=port))
        self._sockets.append(sock)
        command = (sys.executable, "-m", "pshare_jax.serve", *args)
        return Plan(f"frontend{index}", command, sock, READY)


def _at_once(actions: Sequence[Callable[[], None]]) -> None:
    """Does all of them, each in a thread, and waits for them."""
    threads = [threading.Thread(target=action) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def launch(config: ServeConfig, args: Sequence[str]) -> int:
    """Runs a cluster until a signal; returns the exit code.

    SIGTERM and SIGINT end it in good order; SIGHUP replaces all processes, see `Launcher.restart`.

    Raises:
        ConfigError: an address that cannot be had.
    """
    if config.cluster.frontends < 1:
        raise ConfigError(f"cluster.frontends must be at least 1, is {config.cluster.frontends}")
    with tempfile.TemporaryDirectory(prefix="pshare-") as name:
        launcher = Launcher(config, args, Path(name))
        wanted: list[int] = []
        wakeup = threading.Event()

        def hear(number: int, _: object) -> None:
            if number != signal.SIGHUP and any(n != signal.SIGHUP for n in wanted):
                os._exit(128 + number)
            wanted.append(number)
            wakeup.set()

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, hear)
        launcher.start()
        announced = False
        code = 0
        while True:
            wakeup.wait(0.1)
            wakeup.clear()
            if any(number != signal.SIGHUP for number in wanted):
                break
            if any(child.gave_up.is_set() for child in launcher.children):
                code = BAD_CONFIG
                break
            if not announced and all(child.is_ready.is_set() for child in launcher.children):
                announced = True
                for url in launcher.urls:
                    say(f"{READY}{url}", sys.stdout)
            elif signal.SIGHUP in wanted:
                wanted.remove(signal.SIGHUP)
                threading.Thread(target=launcher.restart, daemon=True).start()
        launcher.stop()
        return code
