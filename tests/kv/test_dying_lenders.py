"""Who dies while pages are read from him holds no thread for long, and nobody else's pages."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from pshare_jax.core.connector import TransferError
from pshare_jax.kv import peers as kv_peers
from pshare_jax.kv import remote as kv_remote
from pshare_jax.kv.peers import Peers
from pshare_jax.kv.ways import Address
from tests.kv.ends import LAYOUT, Link, contents_of

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
SAYS = {"nothing": b"", "half of a page": HEAD % LAYOUT.bytes_per_page + b"half"}


class Dying:
    """A process that hears what it is asked, says something, and then nothing any more."""

    def __init__(self, says: bytes):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._says = says
        self._sockets: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.heard = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connected, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(connected)
            data = b""
            while b"\r\n\r\n" not in data and (more := connected.recv(4096)):
                data += more
            if data:
                connected.sendall(self._says)
                self.heard.release()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(60)
        for connected in self._sockets:
            connected.close()


@pytest.fixture(params=SAYS)
def dying(request: pytest.FixtureRequest) -> Iterator[Dying]:
    process = Dying(SAYS[request.param])
    yield process
    process.close()


class Asking(threading.Thread):
    """Reads pages until that ends; `error` says how."""

    def __init__(self, peers: Peers, url: str, transfer: int):
        super().__init__(daemon=True)
        self._asked = peers, url, transfer
        self.error = ""
        self.start()

    def run(self) -> None:
        peers, url, transfer = self._asked
        try:
            with peers.get_pages(url, transfer) as answer:
                answer.read()
        except TransferError as error:
            self.error = str(error)


def set_patience(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    for name in ("ANSWER_SECONDS", "SILENT_SECONDS"):
        monkeypatch.setattr(kv_peers, name, seconds)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends before it was stopped ends the test."""
    set_patience(monkeypatch, 600.0)


@pytest.mark.usefixtures("patient")
def test_what_is_not_wanted_any_more_is_waited_for_no_longer(dying: Dying) -> None:
    peers = Peers()
    reads = [Asking(peers, dying.url, transfer) for transfer in (7, 8)]
    for _ in reads:
        assert dying.heard.acquire(timeout=60)
    peers.stop(7)
    reads[0].join(60)
    assert reads[0].error.startswith(f"transfer 7: {dying.url} does not answer: ")
    assert reads[1].is_alive(), "another one is waited for"
    peers.stop(8)
    reads[1].join(60)
    assert not reads[1].is_alive()
    assert peers._readings == {}


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("dying", ["nothing"], indirect=True)
def test_what_is_given_up_while_it_is_connected_is_not_asked_for(
    dying: Dying, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody could be asked for it again."""
    peers, connect = Peers(), http.client.HTTPConnection.connect

    def slow(connection: http.client.HTTPConnection) -> None:
        connect(connection)
        peers.stop(7)

    monkeypatch.setattr(http.client.HTTPConnection, "connect", slow)
    with (
        pytest.raises(TransferError, match=r"transfer 7: .* it is not wanted any more"),
        peers.get_pages(dying.url, 7),
    ):
        pass
    assert not dying.heard.acquire(blocking=False)
    assert peers._readings == {}


def test_who_says_nothing_is_given_up(dying: Dying, monkeypatch: pytest.MonkeyPatch) -> None:
    set_patience(monkeypatch, 0.05)
    reading = Asking(Peers(), dying.url, 7)
    reading.join(60)
    assert reading.error == f"transfer 7: {dying.url} does not answer: timed out"


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("link", ["http"], indirect=True)
@pytest.mark.parametrize("accepted", [True, False])
def test_pages_of_the_living_do_not_wait_for_those_of_the_dead(
    link: Link, dying: Dying, accepted: bool
) -> None:
    """All threads wait for a process that has died, when it is noticed."""
    address = Address("prefill0", "http", "/nowhere", dying.url).encode()
    lost = [link.offer([page]) for page in range(1, 1 + kv_remote.READERS)]
    for pull in lost:
        if accepted:
            link.receiver.accept(msgspec.structs.replace(pull, address=address))
        else:
            link.receiver.read_ahead(pull.transfer, address, 1)
    for _ in lost:
        assert dying.heard.acquire(timeout=60)
    expected = contents_of(link.source)
    pull = link.offer([9])
    link.receiver.read_ahead(pull.transfer, pull.address, 1)
    assert not link.receiver._ahead._begun[pull.transfer].reading.done()
    for one in lost:
        link.receiver.abort(one.transfer)
    link.move(pull)
    np.testing.assert_array_equal(contents_of(link.target)[:, 80], expected[:, 8])
    assert len(link.receiver._ahead) == 0
