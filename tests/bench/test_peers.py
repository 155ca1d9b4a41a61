"""Servers of other projects are started as they are told, and ended with their children."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from pshare_jax.bench.llama_servers import LlamaServers, running_llama
from pshare_jax.bench.vllm_servers import VllmServers, running_vllm, running_vllm_lora
from pshare_jax.errors import BenchmarkError

# Answers any GET with its flags and environment; its child shares its process group.
FAKE = """
import http.server, json, os, subprocess, sys
if "broken" in sys.argv:
    sys.exit("no such model")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        names = (
            "VLLM_CPU_KVCACHE_SPACE",
            "VLLM_CPU_OMP_THREADS_BIND",
            "OMP_WAIT_POLICY",
            "OMP_NUM_THREADS",
        )
        environment = {name: os.environ.get(name) for name in names}
        facts = {"argv": sys.argv[1:], "child": child.pid, "environment": environment}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(facts).encode())

    def log_message(self, *args):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def python(tmp_path, monkeypatch) -> str:
    folder = tmp_path / "vllm/entrypoints/openai"
    folder.mkdir(parents=True)
    (folder / "api_server.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return sys.executable


def ask(url: str) -> dict:
    with urllib.request.urlopen(url) as response:
        return json.loads(response.read())


def wait_until_dead(pid: int) -> None:
    """It has been killed; when it is gone is the kernel's business."""
    deadline = time.monotonic() + 30
    stat = Path(f"/proc/{pid}/stat")
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_each_model_has_a_server_until_the_end(python):
    servers = VllmServers(
        python, "folder", kv_gib=2, args=["--seed", "7"], environment={"OMP_NUM_THREADS": "1"}
    )
    with running_vllm(servers, 2) as urls:
        first, second = map(ask, urls)
        os.kill(first["child"], 0)  # it lives
    assert len(set(urls)) == 2
    assert first["environment"] == {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": "1",
    }
    assert first["argv"][:4] == ["--model", "folder", "--served-model-name", "model0"]
    assert second["argv"][3] == "model1"
    assert first["argv"][-6:-4] == ["--seed", "7"]
    for facts in (first, second):
        wait_until_dead(facts["child"])


def test_threads_are_bound_as_one_says(python):
    servers = VllmServers(python, "folder", environment={"VLLM_CPU_OMP_THREADS_BIND": "0-1"})
    with running_vllm(servers, 1) as urls:
        assert ask(urls[0])["environment"]["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"


def test_one_server_of_a_model_and_its_adapters(python):
    adapters = {"family": "modules/family", "code": "modules/code"}
    with running_vllm_lora(VllmServers(python, "folder", adapters=adapters)) as url:
        argv = ask(url)["argv"]
    assert argv[argv.index("--enable-lora") :][:6] == [
        "--enable-lora",
        "--max-loras",
        "2",
        "--lora-modules",
        "family=modules/family",
        "code=modules/code",
    ]
    assert argv[argv.index("--served-model-name") + 1] == "model0"


def test_a_server_of_llama_cpp_for_each_model(tmp_path):
    binary = tmp_path / "llama-server"
    binary.write_text(f"#!{sys.executable}\n{FAKE}")
    binary.chmod(0o755)
    servers = LlamaServers(str(binary), "model.gguf", slots=8, context=600, args=["--mlock"])
    with running_llama(servers, 2) as urls:
        first, second = (ask(url)["argv"] for url in urls)
    given = dict(zip(first[::2], first[1::2], strict=False))
    assert given["--model"] == "model.gguf"
    assert (given["--parallel"], given["--ctx-size"]) == ("8", "4800")
    assert given["--threads"] == "2"
    assert "--mlock" in first
    assert first[first.index("--alias") + 1] == "model0"
    assert second[second.index("--alias") + 1] == "model1"


def test_a_server_that_does_not_start(python):
    for servers, message in (
        (VllmServers(python, "broken"), "vllm.python: the server ended: 1\\nno such model"),
        (VllmServers("nowhere", "folder"), "vllm.python: nowhere: No such file"),
    ):
        with pytest.raises(BenchmarkError, match=message), running_vllm(servers, 1):
            pass
