"""What is printed and logged never ends or holds up the server, and no client can flood it."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from pshare_jax.serve.logs import LineFormatter, LineWriter, RateLimit
from tests.serve.server import SECONDS, eventually

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@contextmanager
def server_process(folder: Path, redirection: str):
    """A server that is ready, with its output where the shell is told to send it; its URL."""
    port = free_port()
    (folder / "STARTED").touch()
    (folder / "OPEN").touch()
    command = f'exec "$0" -m tests.serve.fake_main "$1" 5 {port} {redirection}'
    with subprocess.Popen(
        ["bash", "-c", command, sys.executable, str(folder)], cwd=ROOT, stdin=subprocess.DEVNULL
    ) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            eventually(lambda: status(f"{url}/ready") == 200)
            yield process, url
        finally:
            process.kill()


def status(url: str, body: dict | None = None) -> int:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return response.status
    except OSError:
        return 0


@pytest.mark.parametrize(
    "redirection",
    [
        "> /dev/full 2>&1",
        "2>&1 | true",
        ">&- 2>&-",
        "<&- >&- 2>&-",
    ],
    ids=["full", "pipe without a reader", "closed", "all closed"],
)
def test_output_that_cannot_be_written_does_not_end_the_server(tokenizer_folder, redirection):
    piped = "| true" in redirection
    if piped:  # without the shell's pipeline, whose process would be another
        redirection = "> >(true) 2>&1"
    with server_process(tokenizer_folder, redirection) as (process, url):
        for _ in range(30):
            assert status(f"{url}/v1/completions", {"model": "planner", "prompt": "x"}) == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0


def test_a_pipe_that_nobody_reads_holds_nobody_up():
    read_end, write_end = os.pipe()
    handler = LineWriter(write_end, max_waiting=50)
    logger = logging.Logger("one of its own")
    logger.addHandler(handler)
    for _ in range(1000):
        logger.info("%s", "x" * 1000)
    assert os.read(read_end, 1000) == b"x" * 1000
    os.close(read_end)
    handler.close()
    handler.close()
    os.close(write_end)


def read_lines(act) -> list[str]:
    """What a `LineWriter` has written when `act` has logged with it."""
    read_end, write_end = os.pipe()
    handler = LineWriter(write_end)
    logger = logging.Logger("one of its own")
    logger.addHandler(handler)
    act(logger, handler)
    handler.close()
    os.close(write_end)
    with os.fdopen(read_end) as file:
        return file.read().splitlines()


def test_lines_come_whole_and_in_order():
    def act(logger: logging.Logger, handler: LineWriter) -> None:
        threads = [
            threading.Thread(target=lambda: [logger.info("%s", "ab" * 100) for _ in range(50)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        logger.info("%d of %d", 1, 2)
        logger.info("%d", "no number")
        logger.info("\ud800")

    lines = read_lines(act)
    assert lines[:200] == ["ab" * 100] * 200
    assert lines[200] == "1 of 2"
    assert lines[201].startswith("unreadable log record from ")
    assert lines[202] == "\\ud800"


def test_lines_of_one_kind_are_bounded_and_counted():
    now = [0.0]

    def act(logger: logging.Logger, handler: LineWriter) -> None:
        handler.addFilter(RateLimit(lambda: now[0]))
        handler.setFormatter(LineFormatter("%(message)s"))
        for time in (0.0, 5.0, 10.0, 10.1):
            now[0] = time
            for index in range(1000 if time < 10 else 1):
                logger.info("bad %s %d", time, index)
        logger.info("another")

    first = [f"bad 0.0 {index}" for index in range(10)]
    assert read_lines(act) == [
        *first,
        "bad 10.0 0 (1990 more of this kind were not logged)",
        "bad 10.1 0",
        "another",
    ]


def test_a_malformed_request_is_one_line_at_most(tokenizer_folder, tmp_path):
    log = tmp_path / "log"
    with server_process(tokenizer_folder, f"2> {log} > /dev/null") as (process, url):
        host, port = url.removeprefix("http://").split(":")
        for index in range(300):
            with socket.create_connection((host, int(port)), timeout=SECONDS) as sock:
                sock.sendall(b"NONSENSE %d\r\n\r\n" % index)
                assert sock.recv(100).startswith(b"HTTP/1.0 400")
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
    lines = [line for line in log.read_text().splitlines() if "GET /ready" not in line]
    assert 1 <= len([line for line in lines if "not HTTP from" in line]) <= 20
    assert len(lines) <= 30
    assert "Traceback" not in log.read_text()
