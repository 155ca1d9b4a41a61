"""Connections by the thousand, clients that are slow on purpose, and two requests in one."""

from __future__ import annotations

import json
import os
import resource
import select
import socket
from contextlib import ExitStack

import pytest

from tests.attack.raw_http import statuses
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import SECONDS, Client, eventually, running_server

CONNECTIONS = 1500
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"model": "planner", "prompt": "x", "max_tokens": 3})


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def impatient(tokenizer):
    config = fake_config(read_timeout_seconds=2.0, write_timeout_seconds=2.0)
    with running_server(fake_engine(tokenizer, config)) as client:
        yield client


def test_1500_connections_that_say_half_of_something(impatient: Client):
    """Others are served meanwhile; then all are cut, and nothing is left of them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    before = open_files()
    starts = [
        b"",
        b"P",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n",
        f"{HEAD}Content-Length: {len(BODY)}\r\n\r\n{BODY[:-5]}".encode(),
        f"{HEAD}Transfer-Encoding: chunked\r\n\r\n5\r\n{BODY[:3]}".encode(),
    ]
    with ExitStack() as stack:
        socks = []
        for index in range(CONNECTIONS):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", impatient.port)))
            sock.settimeout(SECONDS)
            sock.sendall(starts[index % len(starts)])
            socks.append(sock)
        assert impatient.complete().status == 200
        for sock in socks:
            answer = b""
            while chunk := sock.recv(4096):
                answer += chunk
            assert statuses(answer) in ([], [408])
    eventually(lambda: open_files() <= before)
    assert impatient.engine.submitted[0].model == "planner"
    assert len(impatient.engine.submitted) == 1


def test_a_body_that_comes_byte_by_byte_is_cut(impatient: Client):
    # It never ends by itself: what ends it is that it takes longer than may be.
    body = BODY.encode() + b" " * 1000
    data = f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode()
    with impatient.raw(data) as sock:
        for byte in body:
            if select.select([sock], [], [], 0.05)[0]:
                break
            try:
                sock.sendall(bytes([byte]))
            except ConnectionError:
                break
        answer = b""
        try:
            while chunk := sock.recv(4096):
                answer += chunk
        except ConnectionError:
            pass  # what we sent after the end was refused
    assert statuses(answer) in ([408], [])
    assert impatient.engine.submitted == []


SECOND = "GET /v1/models/second HTTP/1.1\r\nHost: x\r\n\r\n"
INNER = f"0\r\n\r\n{SECOND}"
SMUGGLED = {
    "both lengths": f"Content-Length: {len(INNER)}\r\nTransfer-Encoding: chunked\r\n\r\n{INNER}",
    "both, the other way": f"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n{INNER}",
    "two lengths": f"Content-Length: 0\r\nContent-Length: {len(SECOND)}\r\n\r\n{SECOND}",
    "a list of lengths": f"Content-Length: 0, {len(SECOND)}\r\n\r\n{SECOND}",
    "a signed length": f"Content-Length: +0\r\n\r\n{SECOND}",
    "a negative length": f"Content-Length: -1\r\n\r\n{SECOND}",
    "a length in hexadecimal": f"Content-Length: 0x0\r\n\r\n{SECOND}",
    "a length with an underscore": f"Content-Length: 1_0\r\n\r\n{SECOND}",
    "a space before the colon": f"Content-Length : {len(SECOND)}\r\n\r\n{SECOND}",
    "a folded line": f"Transfer-Encoding:\r\n chunked\r\nContent-Length: 0\r\n\r\n{SECOND}",
    "an unknown coding": f"Transfer-Encoding: xchunked\r\n\r\n{INNER}",
    "chunked twice": f"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n{INNER}",
    "chunked not last": f"Transfer-Encoding: chunked, gzip\r\n\r\n{INNER}",
    "a vertical tab": f"Transfer-Encoding: \x0bchunked\r\nContent-Length: 0\r\n\r\n{SECOND}",
    "a signed chunk": f"Transfer-Encoding: chunked\r\n\r\n+0\r\n\r\n{SECOND}",
    "a chunk in hexadecimal": f"Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n{SECOND}",
    "a chunk that is longer": f"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n{INNER}",
    "a bare line end": f"X: 1\nContent-Length: {len(SECOND)}\r\n\r\n{SECOND}",
    "a carriage return": f"X: 1\rContent-Length: 0\r\n\r\n{SECOND}",
    "a nul": f"X: \0\r\nContent-Length: 0\r\n\r\n{SECOND}",
    "a header without a name": f": 1\r\nContent-Length: 0\r\n\r\n{SECOND}",
}


@pytest.mark.parametrize("name", SMUGGLED)
def test_a_second_request_cannot_hide_in_a_first(victim: Client, name: str):
    """What two servers may read as one request or two is read as none, and the connection ends."""
    with victim.raw(f"{HEAD}{SMUGGLED[name]}".encode("latin-1")) as sock:
        answer = b""
        while chunk := sock.recv(65536):
            answer += chunk
    assert statuses(answer) == [400], answer
    assert b"second" not in answer.partition(b"\r\n\r\n")[2]
