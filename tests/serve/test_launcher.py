"""Processes that are started again when they end; programs without models stand for them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pshare_jax.config import ServerConfig
from pshare_jax.serve import launcher, supervision
from pshare_jax.serve.launcher import Launcher
from pshare_jax.serve.local_host import LocalHost
from pshare_jax.serve.supervision import BAD_CONFIG, Child, Spec
from tests.serve.server import eventually

_BEGIN = "import signal, sys, time; print('up', flush=True); "
LIVES = _BEGIN + "time.sleep(1000)"
DRAINS = (
    "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); "
    f"{_BEGIN}signal.sigwait([signal.SIGTERM]); sys.exit(0)"
)
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + LIVES
WRONG = f"import sys; sys.exit({BAD_CONFIG})"
SERVES = (
    "import http.server, socket, sys; "
    "sock = socket.socket(fileno=int(sys.argv[1].removeprefix('--listen-fd='))); "
    "answer = lambda self: (self.send_response(200), self.end_headers()); "
    "kind = type('H', (http.server.BaseHTTPRequestHandler,), "
    "{'do_GET': answer, 'log_message': lambda *a: None}); "
    "server = http.server.HTTPServer(('127.0.0.1', 0), kind, bind_and_activate=False); "
    "server.socket = sock; print('up', flush=True); server.serve_forever()"
)


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    made: list[Child] = []

    def make(program: str, *, health: bool = False, name: str = "w", drain: float = 20.0) -> Child:
        command = (sys.executable, "-S", "-c", program)
        spec = Spec(name, command, ("127.0.0.1", 0), "up", watched=health)
        made.append(Child(spec, LocalHost(ServerConfig()), drain))
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        pid = one.pid
        one._drain_seconds = 0.0
        if pid is not None:
            os.kill(pid, signal.SIGCONT)
        one.stop()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(supervision, "MAX_AGAIN_SECONDS", 0.02)
    monkeypatch.setattr(supervision, "END_SECONDS", 0.1)
    monkeypatch.setattr(supervision, "HEALTH_SECONDS", 0.2)


def test_who_dies_is_started_again(child: Callable[..., Child]) -> None:
    one = child(LIVES)
    assert one.is_ready.wait(60)
    for _ in range(3):
        pid = one.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        eventually(lambda pid=pid: one.pid not in (None, pid) and one.is_ready.is_set())
    assert not one.gave_up.is_set()


def test_who_cannot_be_configured_is_not(child: Callable[..., Child]) -> None:
    one = child(WRONG)
    assert one.gave_up.wait(60)
    assert one.code == BAD_CONFIG
    assert one.pid is None


def test_who_has_been_ready_is_started_again_whatever_it_says(
    child: Callable[..., Child], tmp_path: Path
) -> None:
    """As when the configuration is wrong for a moment, while processes are replaced."""
    program = (
        f"import os, sys; path = {str(tmp_path / 'runs')!r}; "
        "runs = os.path.getsize(path) if os.path.exists(path) else 0; "
        f"open(path, 'a').write('x'); (runs in (1, 2)) and sys.exit({BAD_CONFIG}); {LIVES}"
    )
    one = child(program)
    assert one.is_ready.wait(60)
    pid = one.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: one.pid not in (None, pid) and one.is_ready.is_set())
    assert (tmp_path / "runs").read_text() == "xxxx"
    assert not one.gave_up.is_set()


def test_who_is_stopped_has_time_to_end(child: Callable[..., Child]) -> None:
    one = child(DRAINS)
    assert one.is_ready.wait(60)
    one.stop()
    assert one.code == 0
    assert one.gave_up.is_set()


def test_who_does_not_end_is_killed(child: Callable[..., Child]) -> None:
    one = child(STUBBORN, drain=0.1)
    assert one.is_ready.wait(60)
    one.stop()
    assert one.code == -signal.SIGKILL


def test_who_hangs_is_killed_and_started_again(
    child: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "HANGS", 3)
    one = child(SERVES, health=True)
    assert one.is_ready.wait(60)
    pid = one.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: one.pid not in (None, pid) and one.is_ready.is_set())


def test_a_cluster_ends_once_however_often_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """By SIGUSR1: the kernel sends it for each thread of whoever has started the launcher."""
    ended: list[str] = []

    def tell() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    def stop() -> None:
        tell()
        ended.append("in good order")

    cluster = SimpleNamespace(start=tell, stop=stop, failed="", is_ready=False)
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in signals}
    monkeypatch.setattr(os, "_exit", ended.append)
    try:
        assert launcher._run(cluster) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended == ["in good order"]


def test_one_of_each_side_is_replaced_at_a_time(
    child: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["prefill0", "prefill1", "decode0", "frontend0"]
    children = {name: child(DRAINS, name=name) for name in names}
    for one in children.values():
        assert one.is_ready.wait(60)
    before = {name: one.pid for name, one in children.items()}
    all_of_them = Launcher.__new__(Launcher)
    all_of_them._lock, all_of_them._stopping = threading.Lock(), threading.Event()
    all_of_them.workers = [children[name] for name in names[:3]]
    all_of_them.frontends = [children["frontend0"]]
    monkeypatch.setattr(all_of_them, "_wait_until_linked", lambda: None)
    all_of_them.restart()
    for name, one in children.items():
        assert one.is_ready.is_set()
        assert one.pid not in (None, before[name])
        assert one.code == 0, "it has ended by itself"
