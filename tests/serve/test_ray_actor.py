"""What Ray's actor does, without Ray: processes that outlive it, one of each name on a host."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest

from pshare_jax.cluster.secret import split_address
from pshare_jax.serve import ray_actor
from pshare_jax.serve.ray_actor import Job, Keeper, run_folder, take_lock
from pshare_jax.serve.ray_drain import drain_host
from tests.serve.server import eventually

LISTENS = (
    "import os, signal, socket, sys; "
    "sock = socket.socket(fileno=int(sys.argv[1].removeprefix('--listen-fd='))); "
    "print('up', os.getpid(), flush=True); "
)
SERVES = LISTENS + "signal.pause()"
ENDS = LISTENS + "sys.exit(3)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SERVES}"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """That of a process which is killed at the end, however it has been left."""
    monkeypatch.setattr(ray_actor.tempfile, "gettempdir", lambda: str(tmp_path))
    listen = ("127.0.0.1", 0)
    yield Job("c", "decode0", ("-S", "-c", SERVES), (), listen, "up", str(tmp_path), 20.0)
    for lock in tmp_path.glob("pshare-*/*/*.lock"):
        os.close(take_lock(lock, 0.0))


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


async def test_a_process_is_ready_and_ends(job: Job) -> None:
    keeper = Keeper(job)
    assert await keeper.digest() == ""
    address, pid = await keeper.start()
    assert (address, pid) == await keeper.start()
    assert await keeper.wait_until_ready()
    assert await keeper.digest() == job.digest
    socket.create_connection(split_address(address), 20).close()
    assert os.getsid(pid) != os.getsid(0)
    await keeper.send(signal.SIGTERM)
    assert await keeper.wait() == -signal.SIGTERM
    assert await keeper.digest() == ""
    await keeper.send(signal.SIGTERM)


async def test_its_code_is_told_and_its_socket_is_closed(job: Job) -> None:
    keeper = Keeper(replace(job, flags=("-S", "-c", ENDS)))
    address, _ = await keeper.start()
    assert await keeper.wait() == 3
    assert await keeper.wait_until_ready()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(split_address(address), 20)


async def test_one_that_others_meet_listens_twice(job: Job) -> None:
    program = (
        "import socket, sys; "
        "given = dict(arg.split('=', 1) for arg in sys.argv[1:]); "
        "at = [socket.socket(fileno=int(given[f'--{n}-fd'])) for n in ('listen', 'gang')]; "
        "print('up', flush=True); "
        "_ = [one.accept()[0].sendall(given['--gang-coordinator'].encode()) for one in at]"
    )
    keeper = Keeper(replace(job, flags=("-S", "-c", program), meets=True))
    address, _ = await keeper.start()
    meeting = await keeper.meeting()
    assert meeting != address
    for place in (address, meeting):
        with socket.create_connection(split_address(place), 20) as sock:
            assert sock.makefile().read() == meeting
    assert await keeper.wait() == 0


async def test_one_that_is_being_started_is_ended_too(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched, may_go_on = threading.Event(), threading.Event()
    launch = ray_actor._launch

    def slowly(job: Job) -> tuple[str, str, IO[bytes]]:
        started = launch(job)
        launched.set()
        may_go_on.wait(60)
        return started

    monkeypatch.setattr(ray_actor, "_launch", slowly)
    keeper = Keeper(job)
    start = asyncio.create_task(keeper.start())
    await asyncio.to_thread(launched.wait, 60)
    end = asyncio.create_task(keeper.end())
    await asyncio.sleep(0)
    assert not end.done()
    may_go_on.set()
    await end
    _, pid = await start
    assert not alive(pid)
    assert await keeper.wait() == -signal.SIGKILL
    # There is nothing to be ended any more, or yet.
    await keeper.end()
    await Keeper(job).end()


async def test_one_that_cannot_be_started_is_not_waited_for(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(job: Job) -> None:
        raise OSError("no")

    monkeypatch.setattr(ray_actor, "_launch", fails)
    keeper = Keeper(job)
    with pytest.raises(OSError, match="no"):
        await keeper.start()
    await keeper.end()


async def test_one_that_ends_before_it_is_ready(job: Job) -> None:
    keeper = Keeper(replace(job, flags=("-S", "-c", "import sys; sys.exit(2)")))
    await keeper.start()
    assert not await keeper.wait_until_ready()
    assert await keeper.wait() == 2


def test_a_process_outlives_who_keeps_it(job: Job) -> None:
    """And all that belongs to that; who comes then has it end in good order first."""
    keep = (
        "import asyncio, sys; from pshare_jax.serve import ray_actor; "
        "from pshare_jax.serve.ray_actor import *; "
        f"ray_actor.tempfile.gettempdir = lambda: {job.folder!r}; "
        f"keeper = Keeper({job!r}); "
        "start = lambda: keeper.start(); "
        "\nasync def main():\n"
        "    print((await keeper.start())[1], await keeper.wait_until_ready(), flush=True)\n"
        "    await keeper.wait()\n"
        "asyncio.run(main())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", keep], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        pid, ready = process.stdout.readline().split()
        assert ready == "True"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert alive(int(pid))

    async def again() -> int:
        _, successor = await Keeper(job).start()
        return successor

    successor = asyncio.run(again())
    assert successor != int(pid)
    assert alive(successor)
    eventually(lambda: not alive(int(pid)))


async def test_one_that_does_not_end_is_killed(job: Job) -> None:
    first = Keeper(replace(job, flags=("-S", "-c", STUBBORN)))
    await first.start()
    assert await first.wait_until_ready()
    _, pid = await Keeper(replace(job, end_seconds=0.2)).start()
    assert await first.wait() == -signal.SIGKILL
    assert alive(pid)


async def test_what_ray_puts_into_the_environment_stays_there(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    seen = Path(job.folder) / "seen"
    program = f"import os; open({str(seen)!r}, 'w').write(' '.join(os.environ))"
    keeper = Keeper(replace(job, flags=("-S", "-c", program)))
    await keeper.start()
    assert await keeper.wait() == 0
    names = set(seen.read_text().split())
    assert "CUDA_VISIBLE_DEVICES" in names
    assert names.isdisjoint({"RAY_AUTH_TOKEN", "OMP_NUM_THREADS"})


def test_jobs_are_told_apart_but_for_flags_that_change(job: Job) -> None:
    assert replace(job, more=("--cluster.workers=[]",)).digest == job.digest
    assert replace(job, flags=("-c", "pass")).digest != job.digest
    assert replace(job, listen=("127.0.0.1", 1)).digest != job.digest


def test_a_folder_that_others_can_use_is_not_used(job: Job) -> None:
    folder = run_folder("c")
    folder.chmod(0o755)
    with pytest.raises(PermissionError, match=str(folder)):
        run_folder("c")
    folder.chmod(0o700)
    run_folder("c")
    other = folder.parent / "d"
    other.symlink_to(folder)
    with pytest.raises(PermissionError):
        run_folder("d")


async def test_a_host_that_is_about_to_go_takes_nothing_more(job: Job) -> None:
    keepers = [Keeper(job), Keeper(replace(job, cluster="d"))]
    for keeper in keepers:
        await keeper.start()
        assert await keeper.wait_until_ready()
    ended = await asyncio.to_thread(drain_host, 20.0)
    assert [Path(lock).parent.name for lock in ended] == ["c", "d"]
    assert [await keeper.wait() for keeper in keepers] == [-signal.SIGTERM] * 2
    with pytest.raises(OSError, match="about to go"):
        await Keeper(job).start()
