"""How a launcher speaks to frontends: over HTTP, with the cluster's token."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Sequence

import msgspec

from pshare_jax.cluster.secret import split_address
from pshare_jax.config import ServerConfig
from pshare_jax.core.load import Load
from pshare_jax.errors import PshareError

PATH = "/cluster/workers"

SECONDS = 3.0
"""That a frontend may take to answer."""

_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class NoAnswerError(PshareError):
    """A frontend has not answered, or not as one does; says how."""


class State(msgspec.Struct, frozen=True):
    """What a frontend says: why it is not linked, by worker's address, empty where it is; and the
    load, once it takes requests."""

    workers: dict[str, str]
    load: Load | None = None


class FrontendClient:
    """Asks frontends, and tells them of workers. Methods block, from any thread.

    Args:
        server: how frontends listen.
        token: of the cluster.
    """

    def __init__(self, server: ServerConfig, token: str):
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._tls: ssl.SSLContext | None = None
        if server.tls_cert:
            # The certificate itself is trusted, whatever name it is for and whoever signed it.
            self._tls = ssl.create_default_context(cafile=server.tls_cert)
            self._tls.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            self._tls.check_hostname = False

    def state(self, address: str) -> State:
        """What a frontend says.

        Raises:
            NoAnswerError: it does not.
        """
        try:
            return msgspec.json.decode(self._ask(address, "GET"), type=State)
        except msgspec.DecodeError as error:
            raise NoAnswerError(f"{address}: {error}") from error

    def tell(self, address: str, workers: Sequence[str]) -> None:
        """Tells a frontend of all worker processes that there are.

        Raises:
            NoAnswerError: it has not heard.
        """
        self._ask(address, "PUT", json.dumps({"workers": list(workers)}).encode())

    def _ask(self, address: str, method: str, body: bytes | None = None) -> bytes:
        host, port = split_address(address)
        host = _ANYWHERE.get(host, host)
        connection: http.client.HTTPConnection
        if self._tls is None:
            connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
        else:
            connection = http.client.HTTPSConnection(host, port, timeout=SECONDS, context=self._tls)
        try:
            connection.request(method, PATH, body, self._headers)
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswerError(f"{address}: {error or type(error).__name__}") from error
        finally:
            connection.close()
        if answer.status != 200:
            shown = text[:200].decode(errors="replace")
            raise NoAnswerError(f"{address}: {answer.status}: {shown}")
        return text
