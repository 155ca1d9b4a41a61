"""What worker processes ask of each other over HTTP: pages, and leave to pull them."""

from __future__ import annotations

import contextlib
import http.client
import ssl
from collections.abc import Iterator
from urllib.parse import urlsplit

import msgspec

from pshare_jax.core.connector import TransferError
from pshare_jax.kv.coding import HEADER, Coding, Wanted

HTTP_SECONDS = 10.0
"""How long another host may let a read wait."""


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


class Peers:
    """Asks other worker processes. Thread-safe.

    Args:
        token: that the processes of the cluster know each other by; empty is none.
        tls: who this process is, and whom it believes; None speaks plain HTTP.
    """

    def __init__(self, token: str = "", tls: ssl.SSLContext | None = None):
        self._headers = {"Authorization": f"Bearer {token}"}
        self._tls = tls

    @contextlib.contextmanager
    def get_pages(
        self, url: str, transfer: int, wanted: Wanted | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """The bytes of a transfer that is on offer, as `wanted`; nobody gets them again.

        Raises:
            TransferError: there is none, or the process at `url` does not answer.
        """
        with self._asked("GET", url, transfer, "", wanted) as answer:
            yield answer

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
        self, method: str, url: str, transfer: int, what: str, wanted: Wanted | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._connection(url)
        headers = self._headers if wanted is None else self._headers | {HEADER: wanted.encode()}
        try:
            connection.request(method, f"/pages/{transfer:016x}{what}", headers=headers)
            answer = connection.getresponse()
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
            return http.client.HTTPSConnection(host, port, timeout=HTTP_SECONDS, context=self._tls)
        return http.client.HTTPConnection(host, port, timeout=HTTP_SECONDS)
