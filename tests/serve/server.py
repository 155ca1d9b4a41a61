"""Runs the real server on a real socket in a thread, and talks to it."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pshare_jax.serve.lifecycle import HttpServer, bind
from tests.serve.fake import FakeOrchestrator

SECONDS = 20


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        return error

    @property
    def events(self) -> list[Any]:
        """The JSON of a stream's events; `[DONE]` stays a string."""
        blocks = self.body.decode().split("\n\n")
        assert blocks.pop() == ""
        assert all(block.startswith("data: ") for block in blocks)
        data = [block.removeprefix("data: ") for block in blocks]
        return [item if item == "[DONE]" else json.loads(item) for item in data]


@dataclass(frozen=True)
class Client:
    """Talks to `engine`'s server at 127.0.0.1:`port`, one connection a request."""

    engine: FakeOrchestrator
    server: HttpServer
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict | None = None
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers), response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, raw, {"Content-Type": "application/json", **headers})

    def complete(self, prompt: Any = "hello", **fields: Any) -> Answer:
        return self.post("/v1/completions", {"model": "planner", "prompt": prompt, **fields})

    def chat(self, content: Any = "hello", **fields: Any) -> Answer:
        body = {"model": "planner", "messages": [{"role": "user", "content": content}], **fields}
        return self.post("/v1/chat/completions", body)

    @contextmanager
    def raw(self, data: bytes, receive_buffer: int | None = None) -> Iterator[socket.socket]:
        """A connection that has sent `data`."""
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(SECONDS)
        sock.connect(("127.0.0.1", self.port))
        with sock:
            sock.sendall(data)
            yield sock

    def raw_request(self, path: str, body: dict, receive_buffer: int | None = None):
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        return self.raw(head.encode() + data, receive_buffer)

    def metric(self, name: str, **labels: str) -> float:
        for line in self.get("/metrics").body.decode().splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.partition("{")[0] == name and all(
                f'{key}="{text}"' in sample for key, text in labels.items()
            ):
                return float(value)
        raise AssertionError(f"no sample {name} with {labels}")


def eventually(condition: Callable[[], bool]) -> None:
    """Waits for something that other threads do."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


@contextmanager
def running_server(engine: FakeOrchestrator, start: bool = True) -> Iterator[Client]:
    """The server over `engine`, which is started first unless `start` is false."""
    if start:
        engine.start()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def call(coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(SECONDS)

    async def build() -> HttpServer:
        return HttpServer(engine)

    with bind(engine.config.server) as sock:
        server = call(build())
        call(server.start(sock))
        try:
            yield Client(engine, server, sock.getsockname()[1])
        finally:
            call(server.close())
            call(loop.shutdown_default_executor())
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
            engine.stop()
