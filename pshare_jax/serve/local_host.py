"""Processes of a cluster on this machine, as the launcher's children.

The launcher listens on every address itself and hands the sockets to its children, so a child that
is started again is found where the former was, and who connects meanwhile waits.
"""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import threading
from collections.abc import Sequence

from pshare_jax.cluster.cpus import kept_to
from pshare_jax.config import ServerConfig
from pshare_jax.serve.gang_process import GangProcess
from pshare_jax.serve.lifecycle import bind
from pshare_jax.serve.supervision import Spec, StartError


def address_of(sock: socket.socket) -> str:
    """`HOST:PORT` of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class LocalHost:
    """Starts children of this process.

    Args:
        server: how frontends listen.
    """

    def __init__(self, server: ServerConfig):
        self._server = server
        self._sockets: dict[str, socket.socket] = {}

    def reserve(self, spec: Spec) -> str:
        """Listens on the address, see `Host.reserve`."""
        host, port = spec.listen
        if spec.side == "frontend":
            sock = bind(dataclasses.replace(self._server, host=host, port=port))
        else:
            sock = socket.create_server((host, port), backlog=128)
        self._sockets[spec.name] = sock
        return address_of(sock)

    def start(self, spec: Spec, cancelled: threading.Event) -> LocalProcess | GangProcess:
        """Starts a child, see `Host.start`."""
        sock = self._sockets[spec.name]
        if spec.hosts == 1:
            return _child(spec, sock)
        # Where the others meet the first one; of each start another one.
        with socket.create_server(("127.0.0.1", 0)) as meeting:
            address = f"--gang-coordinator={address_of(meeting)}"
            first = (address, "--gang-rank=0", f"--gang-fd={meeting.fileno()}")
            members = [_child(spec, sock, first, meeting)]
            try:
                for rank in range(1, spec.hosts):
                    flags = (address, f"--gang-rank={rank}")
                    members += [_child(spec, None, flags)]
            except StartError:
                for member in members:
                    member.kill()
                    member.wait()
                raise
        return GangProcess(spec.name, members)

    def release(self, name: str) -> None:
        """Closes the socket, see `Host.release`."""
        if (sock := self._sockets.pop(name, None)) is not None:
            sock.close()

    def close(self) -> None:
        """See `Host.close`; the sockets were closed by `release`."""


def _child(
    spec: Spec,
    sock: socket.socket | None,
    flags: Sequence[str] = (),
    other: socket.socket | None = None,
) -> LocalProcess:
    """Starts one process.

    Args:
        spec: what to run.
        sock: that it is to listen on; without one it takes what it finds.
        flags: more of them.
        other: another socket that it gets.

    Raises:
        StartError: it cannot be started.
    """
    sockets = [s for s in (sock, other) if s is not None]
    if sock is not None:
        flags = [*flags, f"--listen-fd={sock.fileno()}"]
    try:
        with kept_to(spec.cpus):
            process = subprocess.Popen(
                [*spec.command, *spec.more, *flags],
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=[s.fileno() for s in sockets],
            )
    except OSError as error:
        raise StartError(str(error)) from error
    return LocalProcess(process, spec.ready, "" if sock is None else address_of(sock))


class LocalProcess:
    """A child of this process.

    Args:
        process: the child; its standard output is a pipe.
        ready: how the line begins by which it says that it is ready.
        address: where it listens.
    """

    def __init__(self, process: subprocess.Popen[str], ready: str, address: str):
        self.address = address
        self._process = process
        self._ready = ready

    @property
    def pid(self) -> int:
        """See `Process.pid`."""
        return self._process.pid

    def wait_until_ready(self) -> bool:
        """See `Process.wait_until_ready`."""
        assert self._process.stdout is not None
        return any(line.startswith(self._ready) for line in self._process.stdout)

    def wait(self) -> int:
        """See `Process.wait`."""
        assert self._process.stdout is not None
        # A pipe that nobody reads would hold it up.
        for _ in self._process.stdout:
            pass
        self._process.stdout.close()
        return self._process.wait()

    def terminate(self) -> None:
        """See `Process.terminate`."""
        self._process.terminate()

    def kill(self) -> None:
        """See `Process.kill`."""
        self._process.kill()
