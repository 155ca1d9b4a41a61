"""Where the processes of a gang come to the first one: who belongs to it is let in."""

from __future__ import annotations

import hmac
import logging
import queue
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from pshare_jax.cluster.gang_wire import PROTOCOL, Connection, Hello, Refused
from pshare_jax.cluster.tls import ClusterTls
from pshare_jax.errors import GangLostError

logger = logging.getLogger(__name__)

HELLO_SECONDS = 5.0
"""That who connects may take to say who it is."""

SAY_SECONDS = 30.0
"""Between two log lines about who is waited for."""

MAX_GREETED = 64
"""Connections that may be asked at once who they are; others wait."""

PAUSE_SECONDS = 0.2
"""After a connection that could not be accepted, for want of file descriptors for example."""

_MAX_HELLO = 4096


@dataclass(frozen=True)
class Member:
    """The connections of another process: what it is told by, and its signs of life."""

    orders: Connection
    life: Connection


class GangDoor:
    """Lets the other processes of a gang in.

    Each who connects is greeted by a thread of its own, so that one who is slow to say who it is
    holds nobody up.

    Args:
        listener: a socket that listens; it is closed once all are there.
        size: processes of the gang, the first one included.
        facts: what must be the same in all of them.
        token: of the cluster.
        tls: its certificates.
    """

    def __init__(
        self,
        listener: socket.socket,
        size: int,
        facts: Mapping[str, str],
        token: str,
        tls: ClusterTls | None,
    ):
        self._listener = listener
        self._size = size
        self._facts = dict(facts)
        self._token = token
        self._tls = tls
        self._greeted: queue.SimpleQueue[tuple[Hello, Connection]] = queue.SimpleQueue()
        self._greeting = threading.BoundedSemaphore(MAX_GREETED)
        self._lock = threading.Lock()
        self._closed = False

    def gather(self) -> dict[int, Member]:
        """Waits until all processes are there; gives them by rank."""
        threading.Thread(target=self._accept, name="gang-door", daemon=True).start()
        found: dict[tuple[int, int], dict[bool, Connection]] = {}
        members: dict[int, Member] = {}
        said = time.monotonic()
        while len(members) < self._size - 1:
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                missing = sorted(set(range(1, self._size)) - set(members))
                logger.info("waiting for processes %s of the gang", missing)
            try:
                hello, connection = self._greeted.get(timeout=1.0)
            except queue.Empty:
                continue
            pair = found.setdefault((hello.rank, hello.incarnation), {})
            pair[hello.life] = connection
            if len(pair) == 2:
                # One that was here before has ended meanwhile.
                members[hello.rank] = Member(pair[False], pair[True])
        self.close()
        chosen = [one for member in members.values() for one in (member.orders, member.life)]
        for connection in (one for pair in found.values() for one in pair.values()):
            if connection not in chosen:
                connection.close()
        return members

    def close(self) -> None:
        """Lets nobody in any more."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            # Has who waits for others there hear of it.
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            logger.debug("the door of a gang: %s", error)
        self._listener.close()
        while not self._greeted.empty():
            self._greeted.get()[1].close()

    def _accept(self) -> None:
        while True:
            self._greeting.acquire()
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                self._greeting.release()
                if self._closed:
                    return
                logger.warning("the door of a gang cannot accept a connection: %s", error)
                time.sleep(PAUSE_SECONDS)
                continue
            threading.Thread(target=self._let_in, args=(sock,), daemon=True).start()

    def _let_in(self, sock: socket.socket) -> None:
        try:
            greeted = self._greet(sock)
        finally:
            self._greeting.release()
        if greeted is None:
            return
        with self._lock:
            if not self._closed:
                self._greeted.put(greeted)
                return
        greeted[1].close()

    def _greet(self, sock: socket.socket) -> tuple[Hello, Connection] | None:
        sock.settimeout(HELLO_SECONDS)
        connection = Connection(sock)
        try:
            if self._tls is not None:
                sock = self._tls.server.wrap_socket(sock, server_side=True)
                connection = Connection(sock)
            hello = connection.receive(_MAX_HELLO)
            if not isinstance(hello, Hello):
                raise GangLostError("does not say who it is")
            refusal = self._refusal(hello, sock)
            if not refusal:
                return hello, connection
            logger.warning("process %d of the gang is refused: %s", hello.rank, refusal)
            connection.send(Refused(refusal))
        except (GangLostError, OSError) as error:
            logger.warning("somebody has connected who is not of this gang: %s", error)
        connection.close()
        return None

    def _refusal(self, hello: Hello, sock: socket.socket) -> str:
        """Why a process cannot be one of this gang, or nothing."""
        if self._tls is not None and isinstance(sock, ssl.SSLSocket) and not sock.getpeercert():
            return "show a certificate of this cluster's CA"
        if not hmac.compare_digest(hello.token.encode(), self._token.encode()):
            return "the token of this cluster is another one"
        if hello.protocol != PROTOCOL:
            return f"protocol is {hello.protocol} there and {PROTOCOL} at process 0"
        if hello.size != self._size or not 0 < hello.rank < self._size:
            return f"it is process {hello.rank} of {hello.size}, but the gang has {self._size}"
        for name, here in self._facts.items():
            if (there := hello.facts.get(name, "")) != here:
                return f"{name} is {there} there and {here} at process 0"
        return ""
