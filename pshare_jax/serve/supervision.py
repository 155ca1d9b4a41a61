"""A process of a cluster that is started again when it ends, wherever it runs.

What to run is a `Spec`, where it runs is a `Host`'s business: this machine (`local_host.py`) or one
that Ray has chosen (`ray_host.py`). When it is started again, and when no more, is said here.
"""

from __future__ import annotations

import dataclasses
import logging
import ssl
import threading
import time
import urllib.error
import urllib.request
from typing import Protocol

from pshare_jax.errors import PshareError

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

LOST = -1
"""Exit code of a child of which nothing can be known any more."""


class StartError(PshareError):
    """A process cannot be started now; says why."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """What to run.

    Args:
        name: its own; a side and a number, `prefill0` or `frontend1`.
        command: program and flags.
        listen: where it is to listen: host, and port; 0 is a free one.
        ready: how the line begins by which it says that it is ready.
        more: flags that may be others at the next start.
        watched: whether it is killed when its `/health` finds that it does not get on.
        hosts: processes that are it together, of which the first one listens: see `serve.gang`.
        cpus: that it is kept to; empty is all.
    """

    name: str
    command: tuple[str, ...]
    listen: tuple[str, int]
    ready: str
    more: tuple[str, ...] = ()
    watched: bool = False
    hosts: int = 1
    cpus: frozenset[int] = frozenset()

    @property
    def side(self) -> str:
        """`prefill`, `decode` or `frontend`."""
        return self.name.rstrip("0123456789")


class Process(Protocol):
    """A process that was started."""

    @property
    def address(self) -> str:
        """`HOST:PORT` at which it listens, or will."""
        ...

    @property
    def pid(self) -> int:
        """On its host."""
        ...

    def wait_until_ready(self) -> bool:
        """Blocks; False if it has ended before it was ready."""
        ...

    def wait(self) -> int:
        """Blocks until it has ended, or nothing can be known of it; its exit code, or `LOST`."""
        ...

    def terminate(self) -> None:
        """Asks it to end in good order; nothing happens if it has ended."""
        ...

    def kill(self) -> None:
        """Ends it at once."""
        ...


class Host(Protocol):
    """Where processes run."""

    def reserve(self, spec: Spec) -> str:
        """The address that a process will have, if that can be known before it runs, else nothing.

        Raises:
            ConfigError: it cannot be had.
        """
        ...

    def start(self, spec: Spec, cancelled: threading.Event) -> Process:
        """Starts a process; blocks until it runs, or `cancelled` is set.

        Raises:
            StartError: it cannot be started now.
        """
        ...

    def release(self, name: str) -> None:
        """A process will not be started again."""
        ...

    def close(self) -> None:
        """Nothing will be started any more."""
        ...


@dataclasses.dataclass
class _Run:
    """A process from its start to its end."""

    process: Process
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)


class Child:
    """A process that is started again when it ends.

    Args:
        spec: what to run.
        host: where.
        drain_seconds: that it takes to end in good order, at most.
        tls: how its health is asked for; None is without certificates.

    Attributes:
        spec: what runs after the next start; may be replaced.
        address: where it is found: that of the process that was ready last, or of the first.
        is_ready: set while it says that it is ready.
        was_ready: whether it has ever been.
        gave_up: set when it ended so that it would end so again; also once it was stopped.
        code: with which it ended last.

    Raises:
        ConfigError: its address cannot be had.
    """

    def __init__(
        self, spec: Spec, host: Host, drain_seconds: float, tls: ssl.SSLContext | None = None
    ):
        self.spec = spec
        self.address = host.reserve(spec)
        self.is_ready = threading.Event()
        self.was_ready = False
        self.gave_up = threading.Event()
        self.code = 0
        self._host = host
        self._drain_seconds = drain_seconds
        self._tls = tls
        self._stopping = threading.Event()
        self._run_now: _Run | None = None
        self._thread = threading.Thread(target=self._run, name=spec.name, daemon=True)

    @property
    def name(self) -> str:
        """Of the process."""
        return self.spec.name

    def start(self) -> None:
        """Starts it, and looks after it from now on."""
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        run = self._run_now
        return None if run is None or run.ended.is_set() else run.process.pid

    def restart(self) -> None:
        """Ends it in good order and waits until the next one is ready."""
        self.is_ready.clear()
        self._end()
        while not self.is_ready.wait(0.1):
            if self.gave_up.is_set():
                return

    def stop(self) -> None:
        """Ends it in good order; blocks. Nothing happens if it was never started."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._end()
            self._thread.join()
        self._host.release(self.name)

    def _end(self) -> None:
        run = self._run_now
        if run is None or run.ended.is_set():
            return
        run.process.terminate()
        if not run.ended.wait(self._drain_seconds + END_SECONDS):
            log.warning("%s does not end: killing it", self.name)
            run.process.kill()
            run.ended.wait()

    def _run(self) -> None:
        seconds = AGAIN_SECONDS
        while not self._stopping.is_set():
            started = self._once()
            if self._stopping.is_set() or (self.code == BAD_CONFIG and not self.was_ready):
                break
            early = started is None or time.monotonic() - started < EARLY_SECONDS
            seconds = min(2 * seconds, MAX_AGAIN_SECONDS) if early else AGAIN_SECONDS
            self._stopping.wait(seconds)
        self.gave_up.set()

    def _once(self) -> float | None:
        """Runs it to its end; when it was ready, by the monotonic clock."""
        try:
            run = self._run_now = _Run(self._host.start(self.spec, self._stopping))
        except StartError as error:
            if not self._stopping.is_set():
                log.warning("%s cannot be started: %s", self.name, error)
            return None
        process, ready = run.process, None
        self.address = self.address or process.address
        if self._stopping.is_set():
            threading.Thread(target=self._end, daemon=True).start()
        if process.wait_until_ready():
            ready = time.monotonic()
            self.address = process.address
            self.was_ready = True
            log.info("%s is ready at %s", self.name, self.address)
            self.is_ready.set()
            if self.spec.watched:
                threading.Thread(target=self._watch, args=(run,), daemon=True).start()
        self.code = process.wait()
        run.ended.set()
        self.is_ready.clear()
        if not self._stopping.is_set():
            log.warning("%s has ended with code %s", self.name, self.code)
        return ready

    def _watch(self, run: _Run) -> None:
        """Kills it when it does not get on any more."""
        missed = 0
        while missed < HANGS:
            if run.ended.wait(HEALTH_SECONDS):
                return
            missed = 0 if _is_healthy(run.process.address, self._tls) else missed + 1
        log.warning("%s hangs: killing it", self.name)
        run.process.kill()


def _is_healthy(address: str, tls: ssl.SSLContext | None) -> bool:
    url = f"{'https' if tls else 'http'}://{address}/health"
    try:
        with urllib.request.urlopen(url, timeout=HEALTH_SECONDS, context=tls) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False
