"""What worker processes ask of each other over HTTP: pages, and leave to pull them."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
from collections import defaultdict
from collections.abc import Iterator
from urllib.parse import urlsplit

import msgspec

from pshare_jax.core.connector import TransferError
from pshare_jax.kv.coding import HEADER, Coding, Wanted

CONNECT_SECONDS = 2.0
"""How long another host may let a connection wait."""

ANSWER_SECONDS = 10.0
"""How long another host may think of an answer: it may have to code all the pages first."""

SILENT_SECONDS = 4.0
"""How long it may then send nothing; one that has died sends nothing ever again."""


class Claimed(msgspec.Struct, frozen=True):
    """A transfer that was claimed.

    Args:
        server: address of the transfer server that has it.
        key: what to ask that for.
        pages: how many there are.
        coding: what who offers them codes by; None if nothing.
        table: the codebook, if the reader does not have it.
        lengths: of the records of the pages of each piece; empty for one that is not coded.
    """

    server: str
    key: int
    pages: int
    coding: Coding | None = None
    table: bytes = b""
    lengths: list[list[int]] = []


class _Reading:
    """Pages that are being asked for, which another thread may end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._stopped = False

    def begin(self, connected: socket.socket) -> None:
        """They come by this socket.

        Raises:
            ConnectionAbortedError: nobody wants them any more.
        """
        with self._lock:
            self._socket = connected
            if self._stopped:
                raise ConnectionAbortedError("it is not wanted any more")

    def stop(self) -> None:
        """Whoever waits for them waits no more."""
        with self._lock:
            self._stopped = True
            if self._socket is not None:
                with contextlib.suppress(OSError):  # it has ended by itself
                    # That of TLS would have a thread that reads find no socket.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


class Peers:
    """Asks other worker processes. Thread-safe.

    Args:
        token: that the processes of the cluster know each other by; empty is none.
        tls: who this process is, and whom it believes; None speaks plain HTTP.
    """

    def __init__(self, token: str = "", tls: ssl.SSLContext | None = None):
        self._headers = {"Authorization": f"Bearer {token}"}
        self._tls = tls
        self._lock = threading.Lock()
        self._readings: defaultdict[int, list[_Reading]] = defaultdict(list)

    @contextlib.contextmanager
    def get_pages(
        self, url: str, transfer: int, wanted: Wanted | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """The bytes of a transfer that is on offer, as `wanted`; nobody gets them again.

        Raises:
            TransferError: there is none, the process at `url` does not answer, or `stop`.
        """
        reading = _Reading()
        with self._lock:
            self._readings[transfer].append(reading)
        try:
            with self._asked("GET", url, transfer, "", wanted, reading) as answer:
                yield answer
        finally:
            with self._lock:
                self._readings[transfer].remove(reading)
                if not self._readings[transfer]:
                    del self._readings[transfer]

    def stop(self, transfer: int) -> None:
        """Ends `get_pages` of a transfer, wherever it waits: what comes is not wanted any more.

        Otherwise who has died would hold a thread until its time is over, and with it the pages of
        those who live.
        """
        with self._lock:
            for reading in self._readings.get(transfer, ()):
                reading.stop()

    def claim_pages(self, url: str, transfer: int, wanted: Wanted | None = None) -> Claimed:
        """Claims a transfer that is on offer for being pulled, as `wanted`; nobody else can.

        Raises:
            TransferError: as of `get_pages`, or the answer makes no sense.
        """
        with self._asked("POST", url, transfer, "/claim", wanted) as answer:
            try:
                return msgspec.json.decode(answer.read(), type=Claimed)
            except msgspec.DecodeError as error:
                raise TransferError(f"transfer {transfer}: {url} answers {error}") from error

    def settle(self, url: str, transfer: int) -> None:
        """Says that a transfer that was claimed has come."""
        with contextlib.suppress(TransferError), self._asked("DELETE", url, transfer, "/claim"):
            pass

    @contextlib.contextmanager
    def _asked(
        self,
        method: str,
        url: str,
        transfer: int,
        what: str,
        wanted: Wanted | None = None,
        reading: _Reading | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._connection(url)
        headers = self._headers if wanted is None else self._headers | {HEADER: wanted.encode()}
        try:
            connection.connect()
            connected = connection.sock
            connected.settimeout(ANSWER_SECONDS)
            if reading is not None:
                reading.begin(connected)
            connection.request(method, f"/pages/{transfer:016x}{what}", headers=headers)
            answer = connection.getresponse()
            connected.settimeout(SILENT_SECONDS)
            if answer.status != 200:
                raise TransferError(f"transfer {transfer}: nothing is on offer ({answer.status})")
            yield answer
        except (OSError, http.client.HTTPException) as error:
            raise TransferError(f"transfer {transfer}: {url} does not answer: {error}") from error
        finally:
            connection.close()

    def _connection(self, url: str) -> http.client.HTTPConnection:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        if parts.scheme == "https":
            return http.client.HTTPSConnection(
                host, port, timeout=CONNECT_SECONDS, context=self._tls
            )
        return http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS)
