"""Gangs of this machine: programs without models stand for the processes of one mesh."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator

import pytest

from pshare_jax.config import ServerConfig
from pshare_jax.serve import gang_process, supervision
from pshare_jax.serve.local_host import LocalHost
from pshare_jax.serve.supervision import BAD_CONFIG, Child, Spec
from tests.serve.server import eventually

_RANK = (
    "import socket, sys, time; "
    "given = dict(arg.split('=', 1) for arg in sys.argv[1:]); rank = int(given['--gang-rank']); "
    "host, port = given['--gang-coordinator'].split(':'); "
)
MEETS = (
    f"{_RANK}"
    "there = socket.socket(fileno=int(given['--gang-fd'])).accept()[0] if rank == 0 "
    "else socket.create_connection((host, int(port))); "
    "rank == 0 and print('up', flush=True); there.recv(1); "
)
"""They end with each other: the first one's link breaks, or the other's."""

ALONE = f"{_RANK}rank == 0 and print('up', flush=True); time.sleep(1000)"
"""They do not notice each other's end."""

WRONG = f"{_RANK}rank == 1 and sys.exit({BAD_CONFIG}); time.sleep(1000)"
"""The first one waits for one that cannot be."""


@pytest.fixture
def gang() -> Iterator[Callable[[str], Child]]:
    made: list[Child] = []

    def make(program: str) -> Child:
        command = (sys.executable, "-S", "-c", program)
        spec = Spec("decode0", command, ("127.0.0.1", 0), "up", hosts=2)
        made.append(Child(spec, LocalHost(ServerConfig()), 0.0))
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(supervision, "END_SECONDS", 0.1)
    monkeypatch.setattr(gang_process, "NOTICE_SECONDS", 0.5)


def pids(child: Child) -> list[int]:
    run = child._run_now
    return [] if run is None or run.ended.is_set() else run.process.pids  # type: ignore[attr-defined]


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("program", [MEETS, ALONE])
@pytest.mark.parametrize("rank", [0, 1])
def test_it_ends_whole_and_is_started_again(
    gang: Callable[[str], Child], program: str, rank: int
) -> None:
    """Also if the others do not notice."""
    one = gang(program)
    assert one.is_ready.wait(60)
    before = pids(one)
    assert len(set(before)) == 2
    os.kill(before[rank], signal.SIGKILL)
    eventually(lambda: len(pids(one)) == 2 and not set(pids(one)) & set(before))
    assert one.is_ready.wait(60)
    assert not any(runs(pid) for pid in before)


def test_one_that_cannot_be_configured_is_given_up(gang: Callable[[str], Child]) -> None:
    one = gang(WRONG)
    assert one.gave_up.wait(60)
    assert one.code == BAD_CONFIG


def test_nothing_is_left_when_it_is_stopped(gang: Callable[[str], Child]) -> None:
    one = gang(ALONE)
    assert one.is_ready.wait(60)
    before = pids(one)
    one.stop()
    assert not any(runs(pid) for pid in before)
