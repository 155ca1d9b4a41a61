"""Warm-up, death, draining and signals; the latter on a process of its own."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from pshare_jax.config import ServerConfig
from pshare_jax.errors import ConfigError
from pshare_jax.serve.__main__ import main
from pshare_jax.serve.lifecycle import BACKLOG, HttpServer, bind, url_of
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import SECONDS, eventually, running_server
from tests.text.tiny import write_byte_level


def state(client) -> tuple[int, int, int]:
    return (
        client.get("/health").status,
        client.get("/ready").status,
        client.complete().status,
    )


def test_while_warming_up_the_server_is_healthy_but_not_ready(tokenizer):
    with running_server(fake_engine(tokenizer), start=False) as client:
        assert state(client) == (200, 503, 503)
        assert client.get("/health").json == {"status": "warming_up"}
        answer = client.chat()
        assert answer.error["code"] == "warming_up"
        assert answer.headers["Retry-After"] == "5"
        # What needs no engine is answered.
        assert client.get("/v1/models").status == 200
        assert client.post("/tokenize", {"prompt": "x"}).status == 200
        client.engine.start()
        assert state(client) == (200, 200, 200)


async def test_thousands_of_connections_may_wait_to_be_taken(tokenizer):
    with bind(ServerConfig(port=0)) as sock:
        most = min(BACKLOG, int(Path("/proc/sys/net/core/somaxconn").read_text()))
        assert places(sock) == most
        server = HttpServer(fake_engine(tokenizer))
        await server.start(sock)
        assert places(sock) == most
        await server.close()


def places(sock: socket.socket) -> int:
    """How many connections may wait at a socket that listens: Linux's `tcpi_sacked`."""
    return struct.unpack_from("I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32), 28)[0]


def test_a_worker_that_has_failed_is_named_while_others_go_on(client):
    client.engine.failed_workers["decode1"] = "RuntimeError: out of memory"
    answer = client.get("/health")
    assert answer.status == 200
    assert answer.json == {
        "status": "degraded",
        "failed_workers": {"decode1": "RuntimeError: out of memory"},
    }
    assert client.complete().status == 200


def test_a_frontend_that_lacks_a_side_is_not_ready_but_takes_requests(client):
    client.engine.lacking = "cover prompts"
    assert state(client) == (200, 503, 200)
    assert client.get("/ready").json == {
        "status": "waiting",
        "reason": "no worker can cover prompts",
    }
    client.engine.lacking = ""
    assert client.get("/ready").json == {"status": "ok"}


def test_a_dead_engine_fails_its_requests_and_the_health_check(client):
    client.engine.gate.clear()
    with client.raw_request("/v1/completions", {"model": "planner", "prompt": "x"}) as sock:
        eventually(lambda: client.engine.running_ids != [])
        client.engine.fail("decode0: out of memory")
        answer = sock.recv(4096)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b'"code":"engine_dead"' in answer
    assert state(client) == (503, 503, 503)
    reason = {"status": "dead", "reason": "decode0: out of memory"}
    assert client.get("/health").json == reason
    assert "decode0: out of memory" in client.complete().error["message"]
    assert client.metric("vllm:num_requests_running", model_name="planner") == 0


def test_a_sequence_that_the_engine_gives_up_is_a_500(client):
    client.engine.gate.clear()
    with client.raw_request("/v1/completions", {"model": "planner", "prompt": "x"}) as sock:
        eventually(lambda: client.engine.running_ids != [])
        client.engine.abort(client.engine.running_ids[0])
        answer = sock.recv(4096)
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b'"code":"generation_failed"' in answer


def test_version_and_models(client):
    assert client.get("/version").json == {"version": "0.1.0"}
    card = client.get("/v1/models").json["data"][2]
    assert client.get("/v1/models/team/critic").json == card
    assert len(card.pop("chat_template")) == 12
    assert card == {
        "id": "team/critic",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "pshare_jax",
        "root": "team/critic",
        "parent": "base",
        "sharing": "isolated",
        "kind": "identity",
        "tail": 1,
        "weights": "plain",
        "max_model_len": 256,
    }


class TestTokens:
    def test_tokenize_and_detokenize_a_prompt(self, client):
        ids = client.engine.tokenizer.encode("hello<|im_end|> 🙂")
        answer = client.post("/tokenize", {"model": "planner", "prompt": "hello<|im_end|> 🙂"})
        assert answer.json == {
            "count": len(ids),
            "max_model_len": 256,
            "tokens": ids,
            "token_strs": None,
        }
        answer = client.post("/detokenize", {"model": "planner", "tokens": ids})
        assert answer.json == {"prompt": "hello<|im_end|> 🙂"}

    def test_tokenize_messages_as_chat_would(self, client):
        messages = [{"role": "user", "content": "hello"}]
        answer = client.post("/tokenize", {"messages": messages, "return_token_strs": True})
        client.chat("hello")
        assert tuple(answer.json["tokens"]) == client.engine.submitted[0].prompt_token_ids
        assert answer.json["token_strs"][0] == "<|im_start|>"

    def test_a_text_longer_than_the_context_can_be_counted(self, client):
        assert client.post("/tokenize", {"prompt": "x" * 50_000}).json["count"] >= 5000

    def test_bad_requests(self, client):
        for path, body, param in [
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": "x", "messages": []}, "prompt"),
            ("/tokenize", {"prompt": 5}, "prompt"),
            ("/tokenize", {"messages": []}, "messages"),
            ("/detokenize", {"tokens": [408]}, "tokens"),
            ("/detokenize", {"tokens": [-1]}, "tokens"),
            ("/detokenize", {"tokens": "x"}, "tokens"),
            ("/detokenize", {}, "tokens"),
        ]:
            answer = client.post(path, body)
            assert (answer.status, answer.error["param"]) == (400, param)
        for path in ("/tokenize", "/detokenize"):
            fields = {"prompt": "x"} if path == "/tokenize" else {"tokens": [5]}
            assert client.post(path, {"model": "nobody", **fields}).status == 404


@dataclass
class Process:
    """A server process; `folder` holds the files that steer its engine."""

    popen: subprocess.Popen
    folder: Path
    url: str

    def touch(self, name: str) -> None:
        (self.folder / name).touch()

    def status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(self.url + path, timeout=SECONDS) as response:
                return response.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except urllib.error.URLError:
            return 0  # nobody listens yet, or any more

    def running(self) -> int:
        """Sequences of the first model that the engine has."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=SECONDS) as response:
            name = b'vllm:num_requests_running{model_name="planner"} '
            [line] = [line for line in response if line.startswith(name)]
            return int(float(line.removeprefix(name)))

    def start(self) -> None:
        self.touch("STARTED")
        assert self.popen.stdout.readline().strip() == self.url

    @contextmanager
    def completion(self, stream: bool = True):
        """A completion that is being generated; of a stream, the headers have come."""
        body = json.dumps({"model": "planner", "prompt": "x", "stream": stream}).encode()
        before = self.running()
        host, port = self.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=SECONDS) as sock:
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            if stream:
                assert sock.recv(4096).startswith(b"HTTP/1.1 200 OK")
            else:
                eventually(lambda: self.running() == before + 1)
            yield sock

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.popen.send_signal(number)

    def wait(self) -> int:
        return self.popen.wait(SECONDS)


@pytest.fixture
def process(tmp_path, request):
    write_byte_level(tmp_path)
    drain = getattr(request, "param", 60.0)
    with subprocess.Popen(
        [
            sys.executable,
            "-W",
            "error",
            "-m",
            "tests.serve.fake_main",
            str(tmp_path),
            str(drain),
            "0",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as popen:
        try:
            yield Process(popen, tmp_path, popen.stdout.readline().strip())
        finally:
            popen.kill()


def read_all(sock: socket.socket) -> bytes:
    received = b""
    while chunk := sock.recv(65536):
        received += chunk
    return received


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(process, number):
    eventually(lambda: process.status("/health") == 200)
    assert process.status("/ready") == 503
    process.start()
    assert process.status("/ready") == 200
    with process.completion() as sock:
        process.signal(number)
        # It still answers, takes nothing new, and the running request goes on to its end.
        eventually(lambda: process.status("/ready") == 503)
        assert process.status("/health") == 200
        request = urllib.request.Request(
            process.url + "/v1/completions",
            json.dumps({"model": "planner", "prompt": "x"}).encode(),
            {"Content-Type": "application/json"},
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=SECONDS)
        with caught.value as error:
            assert (error.code, json.load(error)["error"]["code"]) == (503, "shutting_down")
        process.touch("OPEN")
        received = read_all(sock)
    assert b"world" in received
    assert b"[DONE]" in received
    assert process.wait() == 0


@pytest.mark.parametrize("process", [0.2], indirect=True)
def test_what_outlasts_the_drain_is_told_so(process):
    process.start()
    with process.completion() as streaming, process.completion(stream=False) as waiting:
        process.signal()
        received = read_all(streaming)
        answer = read_all(waiting)
    assert b'data: {"error":{"message":"the server is shutting down"' in received
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b'"code":"shutting_down"' in answer
    assert process.wait() == 0


def test_a_second_signal_ends_at_once(process):
    process.start()
    with process.completion():
        process.signal()
        eventually(lambda: process.status("/ready") == 503)
        process.signal()
        assert process.wait() == 128 + signal.SIGTERM


def test_sighup_reads_keys_again_and_ends_nothing(process):
    process.start()
    with process.completion() as sock:
        process.signal(signal.SIGHUP)
        assert process.status("/ready") == 200
        process.touch("OPEN")
        received = b""
        while b"[DONE]" not in received:
            received += sock.recv(65536)
    assert process.status("/ready") == 200


def test_a_signal_during_warm_up_ends_cleanly(process):
    eventually(lambda: process.status("/health") == 200)
    process.signal()
    assert process.wait() == 0


def test_a_failed_warm_up_is_logged_and_ends_the_process(process):
    process.touch("FAIL")
    time.sleep(0.1)
    process.touch("STARTED")
    assert process.wait() == 1
    assert "RuntimeError: no such device" in process.popen.stderr.read()


class TestCommandLine:
    def test_help_is_useful_and_neither_it_nor_a_launcher_needs_jax(self):
        program = (
            "import sys; sys.argv = ['serve', '--help']\n"
            "from pshare_jax.serve.__main__ import main\n"
            "import pshare_jax.serve.launcher\n"
            "try: main()\n"
            "finally: assert 'jax' not in sys.modules\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        for text in ("--config", "--port", "--server.drain_seconds", "--decode.max_num_seqs"):
            assert text in run.stdout

    @pytest.mark.parametrize(
        ("args", "named"),
        [
            (["--base", "x", "--port", "many"], "port"),
            (["--base", "x", "--server.prot", "1"], "prot"),
            (["--config", "/nowhere.yaml"], "nowhere.yaml"),
            ([], "base"),
        ],
    )
    def test_a_wrong_argument_is_one_line_and_exit_code_2(self, capsys, args, named):
        assert main(args) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("pshare_jax.serve: ")
        assert captured.err.count("\n") == 1
        assert named in captured.err

    def test_an_address_that_is_taken(self):
        with bind(ServerConfig(port=0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{port}"):
                bind(ServerConfig(port=port))
        with pytest.raises(ConfigError, match=r"server\.port"):
            bind(ServerConfig(port=70_000))

    def test_a_taken_address_is_said_before_anything_is_loaded(self, capsys):
        with bind(ServerConfig(port=0)) as taken:
            port = taken.getsockname()[1]
            assert main(["--base=no such folder", f"--port={port}"]) == 2
        assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err

    HOMELESS = (
        "import pwd, sys\n"
        "def nobody(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = nobody\n"
        "from pshare_jax.serve.__main__ import main\n"
        "sys.exit(main(['--base=nowhere', '--port=0']))\n"
    )

    def test_a_user_without_home_and_passwd_entry_gets_as_far_as_anybody(self, tmp_path):
        hidden = ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME")
        environment = {k: v for k, v in os.environ.items() if k not in hidden}
        done = subprocess.run(
            [sys.executable, "-c", self.HOMELESS],
            cwd=Path(__file__).parents[2],
            # Without a compiler, too: its time is none of this test's business.
            env={**environment, "TMPDIR": str(tmp_path), "PATH": str(tmp_path), "CXX": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("pshare_jax.serve: ")
        assert "nowhere: is not a checkpoint" in last

    @pytest.mark.parametrize("redirection", ["2> /dev/full", "2>&-", "> /dev/full 2>&1"])
    def test_the_exit_code_is_right_though_nobody_can_be_told(self, redirection):
        command = f'exec "$0" -m pshare_jax.serve --base=x --port=70000 {redirection}'
        root = Path(__file__).parents[2]
        done = subprocess.run(["bash", "-c", command, sys.executable], cwd=root, check=False)
        assert done.returncode == 2

    def test_port_0_picks_a_free_one(self):
        with bind(ServerConfig(port=0)) as sock:
            assert url_of(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"


@pytest.mark.parametrize(
    "name", ["max_n", "max_prompts", "max_fanout", "max_body_items", "worker_threads"]
)
def test_limits_of_nothing_are_refused(name):
    with pytest.raises(ConfigError, match=f"server.{name} must be at least 1, got 0"):
        bind(fake_config(**{name: 0}).server)


def test_pings_in_the_past_are_refused():
    with pytest.raises(ConfigError, match="ping_seconds must not be negative"):
        bind(fake_config(ping_seconds=-1).server)
