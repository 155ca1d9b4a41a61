"""Bytes that are nearly HTTP: valid requests with random damage, the same for the same seed."""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
from collections.abc import Iterator

SECONDS = 20
PATIENCE = 0.2
_STATUS = re.compile(rb"^HTTP/1\.[01] (\d{3}) ", re.MULTILINE)
_ODD = [
    b"\0",
    b"\r",
    b"\n",
    b"\r\n",
    b"\r\n\r\n",
    b"\xff",
    b" ",
    b"\t",
    b":",
    b";",
    b"%",
    b"\x7f",
    b"\x80",
]
_HEADERS = [
    b"Content-Length: 0", b"Content-Length: 5", b"Content-Length: +5", b"Content-Length: -1",
    b"Content-Length: 99999999999999999999", b"Content-Length: 0x10", b"Content-Length: 1, 2",
    b"Content-Length : 5", b" Content-Length: 5", b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: chunked, chunked", b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: \x0bchunked", b"Transfer-Encoding: identity",
    b"Transfer-encoding : chunked",
    b"Connection: close", b"Connection: upgrade", b"Upgrade: websocket", b"Upgrade: h2c",
    b"Expect: 100-continue", b"Expect: 200-ok", b"Content-Encoding: gzip", b"Content-Encoding: br",
    b"Host: a", b"Host:", b"X: " + b"y" * 9000, b"Origin: null", b"Authorization: Bearer \xff\xfe",
    b"X-Request-Id: \r\n injected", b"Content-Type: text/plain",
    b"Content-Type: application/json; a=\"",
    b"Cookie: \x00", b"Range: bytes=0-", b"If-None-Match: *", b"TE: trailers",
    b"Sec-WebSocket-Key: x",
    b"traceparent: 00-0-0-0", b"Accept-Encoding: gzip", b"Keep-Alive: timeout=-1",
]  # fmt: skip
_PATHS = [
    b"/v1/completions", b"/v1/chat/completions", b"/v1/responses", b"/v1/messages", b"/tokenize",
    b"/detokenize", b"/v1/models", b"/v1/models/team%2Fcritic", b"/v1/models/%00", b"/v1/models/..",
    b"/metrics", b"/health", b"/", b"*", b"//", b"/%", b"/%zz", b"/\xff", b"/?" + b"a" * 3000,
    b"http://other/v1/models", b"/v1/models/%ed%a0%80", b"/../etc/passwd", b"/health#x",
    b"/openapi.json",
]  # fmt: skip
_METHODS = [b"GET", b"POST", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE", b"CONNECT", b"PRI",
            b"get", b"", b"G\0T", b"POST" * 50]  # fmt: skip
_BODIES: list[tuple[bytes, object]] = [
    (_PATHS[0], {"model": "planner", "prompt": "x", "max_tokens": 3}),
    (_PATHS[0], {"model": "coder", "prompt": ["a", "b"], "stream": True, "n": 2, "max_tokens": 2}),
    (_PATHS[0], {"model": "nobody", "prompt": "x"}),
    (_PATHS[1], {"model": "planner", "messages": [{"role": "user", "content": "x"}]}),
    (_PATHS[2], {"model": "planner", "input": "x", "max_output_tokens": 2, "stream": True}),
    (
        _PATHS[3],
        {"model": "planner", "max_tokens": 2, "messages": [{"role": "user", "content": "x"}]},
    ),
    (_PATHS[4], {"prompt": "x"}),
    (_PATHS[5], {"tokens": [5, 6]}),
    (_PATHS[5], []),
    (_PATHS[0], None),
]


def requests(rng: random.Random) -> bytes:
    """One to three requests on one connection: odd ones, damaged ones, or ones with no fault."""
    count = rng.choice((1, 1, 1, 2, 3))
    match rng.choice(("plain", "odd", "damaged")):
        case "plain":
            lines = [b"Connection: close"]
            return b"".join(_plain(rng, lines if i == count - 1 else []) for i in range(count))
        case "odd":
            return b"".join(_odd(rng) for _ in range(count))
        case _:
            data = b"".join(_plain(rng, []) for _ in range(count))
            for _ in range(rng.choice((1, 1, 2, 5))):
                data = _damage(rng, data)
            return data


def _plain(rng: random.Random, lines: list[bytes]) -> bytes:
    path, value = rng.choice(_BODIES)
    body = json.dumps(value).encode()
    lines = [b"Host: x", b"Content-Type: application/json", *lines]
    if rng.random() < 0.3:
        cut = rng.randint(1, len(body))
        pieces = [piece for piece in (body[:cut], body[cut:], b"") if piece] + [b""]
        body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
        lines.append(b"Transfer-Encoding: chunked")
    else:
        lines.append(b"Content-Length: %d" % len(body))
    return _text(b"POST", path, b"HTTP/1.1", lines, body)


def _odd(rng: random.Random) -> bytes:
    path, value = rng.choice(_BODIES)
    body = json.dumps(value).encode() if rng.random() < 0.8 else rng.randbytes(20)
    lines = [b"Host: x", b"Content-Type: application/json"]
    if rng.random() < 0.3:
        body = _chunked(rng, body)
        lines.append(b"Transfer-Encoding: chunked")
    else:
        length = len(body) + (rng.choice((-1, 1, 100)) if rng.random() < 0.1 else 0)
        lines.append(b"Content-Length: %d" % length)
    lines += rng.sample(_HEADERS, rng.choice((0, 1, 1, 2)))
    rng.shuffle(lines)
    method = b"POST" if rng.random() < 0.7 else rng.choice(_METHODS)
    path = path if rng.random() < 0.6 else rng.choice(_PATHS)
    version = rng.choice((b"HTTP/1.1",) * 8 + (b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b""))
    return _text(method, path, version, lines, body)


def _text(method: bytes, path: bytes, version: bytes, lines: list[bytes], body: bytes) -> bytes:
    return b"%s %s %s\r\n%s\r\n\r\n%s" % (method, path, version, b"\r\n".join(lines), body)


def _chunked(rng: random.Random, body: bytes) -> bytes:
    chunks = []
    while body:
        size = rng.randint(1, len(body))
        stated = size if rng.random() < 0.95 else rng.choice((0, size + 1, -1, 2**64))
        chunks.append(b"%x\r\n%s\r\n" % (stated if stated >= 0 else 15, body[:size]))
        body = body[size:]
    end = rng.choice((b"0\r\n\r\n",) * 6 + (b"0\r\nTrailer: x\r\n\r\n", b"", b"0\r\n"))
    return b"".join(chunks) + end


def _damage(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    to = min(len(data), at + rng.choice((1, 1, 4, 40)))
    match rng.choice(("flip", "insert", "delete", "repeat", "cut", "odd")):
        case "flip" if at < len(data):
            return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        case "insert":
            return data[:at] + rng.randbytes(rng.choice((1, 3, 300))) + data[at:]
        case "delete":
            return data[:at] + data[to:]
        case "repeat":
            return data[:to] + data[at:]
        case "cut":
            return data[:at]
        case _:
            return data[:at] + rng.choice(_ODD) + data[at:]


def exchange(rng: random.Random, port: int, data: bytes) -> bytes:
    """All that the server says to `data`, sent in pieces.

    A server that waits for more, since the damage tells it so, is told that no more will come.

    Raises:
        TimeoutError: it does not even close then.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as sock:
        received = b""
        with contextlib.suppress(ConnectionError):  # it may close while we still talk
            for piece in _pieces(rng, data):
                sock.sendall(piece)
            sock.settimeout(PATIENCE)
            while True:
                try:
                    chunk = sock.recv(65536)
                except TimeoutError:
                    sock.settimeout(SECONDS)
                    sock.shutdown(socket.SHUT_WR)
                    chunk = sock.recv(65536)
                if not chunk:
                    break
                received += chunk
        return received


def _pieces(rng: random.Random, data: bytes) -> Iterator[bytes]:
    if rng.random() < 0.7:
        yield data
        return
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        if start < end:
            yield data[start:end]


def statuses(received: bytes) -> list[int]:
    """Of the answers, in order; 100 is none."""
    found = [int(status) for status in _STATUS.findall(received)]
    return [status for status in found if status != 100]
