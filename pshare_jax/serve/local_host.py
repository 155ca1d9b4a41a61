"""Processes of a cluster on this machine, as the launcher's children.

The launcher listens on every address itself and hands the sockets to its children, so a child that
is started again is found where the former was, and who connects meanwhile waits.
"""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import threading

from pshare_jax.config import ServerConfig
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

    def start(self, spec: Spec, cancelled: threading.Event) -> LocalProcess:
        """Starts a child, see `Host.start`."""
        sock = self._sockets[spec.name]
        descriptor = sock.fileno()
        try:
            process = subprocess.Popen(
                [*spec.command, *spec.more, f"--listen-fd={descriptor}"],
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=(descriptor,),
            )
        except OSError as error:
            raise StartError(str(error)) from error
        return LocalProcess(process, spec.ready, address_of(sock))

    def release(self, name: str) -> None:
        """Closes the socket, see `Host.release`."""
        if (sock := self._sockets.pop(name, None)) is not None:
            sock.close()

    def close(self) -> None:
        """See `Host.close`; the sockets were closed by `release`."""


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
