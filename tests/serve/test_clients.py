"""Slow and vanished clients: they are let go, and what they held comes back."""

import json
import socket

import pytest

from tests.serve.server import Client, eventually
from tests.serve.test_completions import script


def read_all(sock: socket.socket) -> bytes:
    received = b""
    while chunk := sock.recv(65536):
        received += chunk
    return received


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_vanished_client_gives_back_every_sequence(client, path, stream):
    client.engine.gate.clear()
    prompt = (
        {"prompt": ["a", "b"]}
        if path == "/v1/completions"
        else {"messages": [{"role": "user", "content": "x"}]}
    )
    body = {"model": "planner", "n": 2, "stream": stream, **prompt}
    count = 4 if "prompt" in prompt else 2
    with client.raw_request(path, body):
        eventually(lambda: len(client.engine.running_ids) == count)
    eventually(lambda: client.engine.running_ids == [])
    assert sorted(client.engine.aborted) == sorted(r.id for r in client.engine.submitted)
    client.engine.gate.set()
    assert client.complete().status == 200


def test_a_client_that_vanishes_in_the_middle_of_a_stream(client):
    script(client.engine, "x", end=False)
    body = {"model": "planner", "prompt": "x", "max_tokens": 250, "stream": True}
    with client.raw_request("/v1/completions", body) as sock:
        received = b""
        while b"data:" not in received:
            received += sock.recv(1000)
        client.engine.gate.clear()
    client.engine.gate.set()
    eventually(lambda: client.engine.running_ids == [])


def test_a_body_that_does_not_arrive_is_408(impatient):
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000\r\n\r\n{"
    )
    with impatient.raw(head) as sock:
        received = sock.recv(4096)
        assert received.startswith(b"HTTP/1.1 408 ")
        error = json.loads(received.partition(b"\r\n\r\n")[2])["error"]
        assert error["code"] == "request_timeout"
        assert error["message"] == "the request body did not arrive within 0.3 seconds"
    assert impatient.complete().status == 200


@pytest.mark.parametrize("head", [b"", b"POST /v1/completions HTTP/1.1\r\nHost:"])
def test_headers_that_do_not_arrive_end_the_connection(impatient, head):
    with impatient.raw(head) as sock:
        assert read_all(sock) == b""
    assert impatient.complete().status == 200


def unread_stream(client: Client):
    """A stream of several megabytes whose client reads nothing."""
    script(client.engine, "x", end=False)
    client.engine.tokens_per_event = 50
    body = {
        "model": "planner",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 90_000,
        "logprobs": True,
        "top_logprobs": 20,
        "stream": True,
    }
    return client.raw_request("/v1/chat/completions", body, receive_buffer=4096)


def test_a_stream_that_is_not_read_is_cut_off(impatient):
    with unread_stream(impatient) as sock:
        eventually(lambda: impatient.engine.submitted != [])
        eventually(lambda: impatient.engine.running_ids == [])
        assert impatient.engine.aborted == [impatient.engine.submitted[0].id]
        with pytest.raises(ConnectionResetError):
            read_all(sock)
    assert impatient.metric(
        "vllm:request_success_total", model_name="planner", finished_reason="abort"
    )


def test_a_stream_that_is_not_read_does_not_hold_up_others(impatient):
    with unread_stream(impatient):
        eventually(lambda: impatient.engine.submitted != [])
        script(impatient.engine, "hello world")
        assert impatient.complete().json["choices"][0]["text"] == "hello world"


def test_an_answer_that_is_not_read_is_cut_off(impatient):
    script(impatient.engine, "x", end=False)
    impatient.engine.tokens_per_event = 1000
    body = {
        "model": "planner",
        "prompt": "x",
        "max_tokens": 20_000,
        "logprobs": 20,
    }
    with impatient.raw_request("/v1/completions", body, receive_buffer=4096) as sock:
        eventually(lambda: impatient.engine.submitted != [])
        eventually(lambda: impatient.engine.running_ids == [])
        # The connection is the server's to end: nothing but its reset is to be seen.
        server = impatient.server
        eventually(lambda: len(server._runner.server.connections) == 0)
        with pytest.raises(ConnectionResetError):
            read_all(sock)


def test_many_connections_that_say_nothing_hurt_nobody(impatient):
    socks = [socket.create_connection(("127.0.0.1", impatient.port)) for _ in range(100)]
    assert impatient.complete().status == 200
    for sock in socks:
        sock.close()


def test_a_pipelined_second_request_is_answered_after_the_first(client):
    body = json.dumps({"model": "planner", "prompt": "x"}).encode()
    one = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    with client.raw(one + one) as sock:
        received = b""
        while received.count(b'"hello world"') < 2:
            received += sock.recv(4096)
    assert received.count(b"HTTP/1.1 200 OK") == 2


def test_garbage_instead_of_http_is_400(client):
    with client.raw(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n") as sock:
        assert sock.recv(100).startswith(b"HTTP/1.0 400 ")
    assert client.complete().status == 200
