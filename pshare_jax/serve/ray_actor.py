"""The Ray actor that keeps one process of a cluster. Needs no jax, and is there before Ray is.

The process is not the actor: it outlives it, so that serving goes on when Ray does not. A lock on a
file of the host says that a process of a name runs there; who comes to run another one of that name
ends the former in good order first.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO

from pshare_jax.serve.detached import EXIT, PID

ENDED_WITHOUT_A_WORD = 1
"""Exit code of a process whose end nobody has told of."""

_POLL_SECONDS = 0.05
_KILLED_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Job:
    """What an actor runs.

    Args:
        cluster: name of the cluster.
        name: of the process.
        flags: of the Python interpreter.
        more: flags that do not count when somebody asks whether it is the same job.
        listen: host and port; an empty host is the address by which Ray knows this host.
        ready: how the line begins by which the process says that it is ready.
        folder: where it runs, if that is there.
        end_seconds: that a former process of the name may take to end.
        meets: whether it listens at a second address, too, where others of its mesh meet it: see
            `serve.gang`.
    """

    cluster: str
    name: str
    flags: tuple[str, ...]
    more: tuple[str, ...]
    listen: tuple[str, int]
    ready: str
    folder: str
    end_seconds: float
    meets: bool = False

    @property
    def digest(self) -> str:
        """Of what makes two jobs the same."""
        same = dataclasses.replace(self, more=())
        return hashlib.blake2b(repr(same).encode(), digest_size=16).hexdigest()


def run_folder(cluster: str) -> Path:
    """The folder of a cluster's locks on this host; made if it is not there.

    Raises:
        PermissionError: somebody else has made it, or may write into it.
    """
    return _own(_own(_root()) / cluster)


def leaving_file() -> Path:
    """A file that is there once this host is about to go and takes nothing more.

    Raises:
        PermissionError: as of `run_folder`.
    """
    return _own(_root()) / "leaving"


def _root() -> Path:
    return Path(tempfile.gettempdir()) / f"pshare-{os.getuid()}"


def _own(path: Path) -> Path:
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or path.is_symlink():
        raise PermissionError(f"{path} must be a folder that only user {os.getuid()} can use")
    return path


class Keeper:
    """Runs one process, and tells of it. An asynchronous actor: who waits holds nobody up.

    Args:
        job: what to run.
    """

    def __init__(self, job: Job):
        self._job = job
        self._address = ""
        self._meeting = ""
        self._pid = 0
        self._is_ready = False
        self._code: int | None = None
        self._changed = asyncio.Condition()
        self._reading: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()

    async def digest(self) -> str:
        """Of the job, while it runs."""
        return self._job.digest if self._pid and self._code is None else ""

    async def start(self) -> tuple[str, int]:
        """Starts the process unless it runs; its address and process id.

        Raises:
            OSError: it cannot be started here.
        """
        async with self._starting:
            if not self._address:
                self._address, self._meeting, pipe = await asyncio.to_thread(_launch, self._job)
                self._reading = asyncio.create_task(self._read(pipe))
        await self._until(lambda: bool(self._pid) or self._code is not None)
        return self._address, self._pid

    async def meeting(self) -> str:
        """Where others of its mesh meet it, once it was started; empty if they do not."""
        return self._meeting

    async def wait_until_ready(self) -> bool:
        """False if it has ended before."""
        await self._until(lambda: self._is_ready or self._code is not None)
        return self._is_ready

    async def wait(self) -> int:
        """Its exit code, once it has ended."""
        await self._until(lambda: self._code is not None)
        assert self._code is not None
        return self._code

    async def send(self, number: int) -> None:
        """Sends it a signal; nothing happens if it has ended."""
        if self._pid and self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)

    async def end(self) -> None:
        """Kills the process, also one that is being started; returns when nothing of it runs."""
        async with self._starting:
            if not self._address:
                return
        await self._until(lambda: bool(self._pid) or self._code is not None)
        await self.send(signal.SIGKILL)
        await self.wait()

    async def _until(self, is_so: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(is_so)

    async def _read(self, pipe: IO[bytes]) -> None:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        try:
            async for line in reader:
                await self._heard(line.decode(errors="replace"))
            await self._heard(f"{EXIT}{ENDED_WITHOUT_A_WORD}")
        finally:
            transport.close()

    async def _heard(self, line: str) -> None:
        async with self._changed:
            if line.startswith(PID):
                self._pid = int(line.removeprefix(PID))
            elif line.startswith(EXIT) and self._code is None:
                self._code = int(line.removeprefix(EXIT))
            elif line.startswith(self._job.ready):
                self._is_ready = True
            self._changed.notify_all()


def _launch(job: Job) -> tuple[str, str, IO[bytes]]:
    """Starts the process; its address, where others meet it, and the pipe that tells of it."""
    if (leaving := leaving_file()).exists():
        raise OSError(f"this host is about to go; if it stays, remove {leaving}")
    lock = take_lock(run_folder(job.cluster) / f"{job.name}.lock", job.end_seconds)
    try:
        with contextlib.ExitStack() as stack:
            sock, address = stack.enter_context(_listen(*job.listen))
            sockets, flags, meeting = [sock], [f"--listen-fd={sock.fileno()}"], ""
            if job.meets:
                other, meeting = stack.enter_context(_listen(job.listen[0], 0))
                sockets.append(other)
                flags += [f"--gang-fd={other.fileno()}", f"--gang-coordinator={meeting}"]
            given = [sock.fileno() for sock in sockets]
            command = [
                *(sys.executable, "-m", "pshare_jax.serve.detached"),
                *(str(lock), ",".join(map(str, given))),
                *(sys.executable, *job.flags, *job.more, *flags),
            ]
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                pass_fds=(lock, *given),
                cwd=job.folder if Path(job.folder).is_dir() else None,
                env=_environment(),
            )
        process.wait()
        assert process.stdout is not None
        return address, meeting, process.stdout
    finally:
        os.close(lock)


@contextlib.contextmanager
def _listen(host: str, port: int) -> Generator[tuple[socket.socket, str]]:
    """A socket, and the address at which other hosts reach it."""
    host = host or _node_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=128) as sock:
        reached = _node_address() if host in ("0.0.0.0", "::") else host
        port = sock.getsockname()[1]
        yield sock, f"[{reached}]:{port}" if ":" in reached else f"{reached}:{port}"


def _node_address() -> str:
    return importlib.import_module("ray.util").get_node_ip_address()


def take_lock(path: Path, seconds: float) -> int:
    """A descriptor of the file, locked; who has it locked is ended in good order, then at once.

    Args:
        path: its contents are the process id of who has it locked.
        seconds: that may be taken to end.

    Raises:
        TimeoutError: even that has not helped.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    pid = b""
    for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, _KILLED_SECONDS)):
        end, told = time.monotonic() + patience, False
        while time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            pid = os.pread(lock, 32, 0)
            if pid and not told:
                told = True
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), number)
            time.sleep(_POLL_SECONDS)
    os.close(lock)
    raise TimeoutError(f"{path}: process {pid.decode()} has it, and does not end")


def _environment() -> dict[str, str]:
    """This one without what Ray has put in for itself; devices stay as it has given them."""
    left = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Set to the number of CPUs that were asked for.
    left.pop("OMP_NUM_THREADS", None)
    return left
