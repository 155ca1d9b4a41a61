"""`--launcher=kubernetes`: what it asks of the API of Kubernetes, of one that is made here."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from pshare_jax.config import ClusterConfig, DecodeConfig, ServeConfig
from pshare_jax.core.load import Load
from pshare_jax.errors import ConfigError
from pshare_jax.launch_config import AutoscaleConfig, KubernetesConfig
from pshare_jax.serve.frontend_client import NoAnswerError, State
from pshare_jax.serve.kubernetes import ApiError, Scaler, Scales, check_kubernetes
from tests.engine.harness import serve_config

PREFILL = "/apis/apps/v1/namespaces/models/statefulsets/pshare-prefill/scale"
DECODE = "/apis/apps/v1/namespaces/models/statefulsets/pshare-decode/scale"
TOKEN = "the pod's own"


class Api:
    """As much of the API as is asked for."""

    def __init__(self, folder: Path):
        self.sizes = {PREFILL: 1, DECODE: 1}
        self.changes: list[tuple[str, int]] = []
        self.broken = False
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer()

            def do_PATCH(self) -> None:
                assert self.headers["Content-Type"] == "application/merge-patch+json"
                change = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path in api.sizes and not api.broken:
                    api.sizes[self.path] = change["spec"]["replicas"]
                    api.changes.append((self.path, change["spec"]["replicas"]))
                self.answer()

            def answer(self) -> None:
                known = self.headers["Authorization"] == f"Bearer {TOKEN}"
                status = 403 if api.broken or not known else 200 if self.path in api.sizes else 404
                body = {"message": "no"}
                if status == 200:
                    body = {"kind": "Scale", "spec": {"replicas": api.sizes[self.path]}}
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.account = folder
        (folder / "namespace").write_text("models\n")
        (folder / "token").write_text(f"{TOKEN}\n")
        openssl = shutil.which("openssl")
        assert openssl
        subprocess.run(
            [
                *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
                *("-nodes", "-subj", "/CN=api", "-addext", "subjectAltName=IP:127.0.0.1"),
                *("-keyout", str(folder / "key"), "-out", str(folder / "ca.crt")),
            ],
            check=True,
            capture_output=True,
        )
        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(folder / "ca.crt", folder / "key")
        self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def scales(self) -> Scales:
        port = str(self.server.server_address[1])
        there = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": port}
        return Scales(self.account, there)


@pytest.fixture(scope="module")
def one_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    api = Api(tmp_path_factory.mktemp("account"))
    yield api
    api.server.shutdown()
    api.server.server_close()


@pytest.fixture
def api(one_api: Api) -> Api:
    one_api.sizes = {PREFILL: 1, DECODE: 1}
    one_api.changes.clear()
    one_api.broken = False
    return one_api


def config(**scale: Any) -> ServeConfig:
    told = {"prefill_tokens_per_s": 1000.0, "decode_sequences": 10.0}
    autoscale = AutoscaleConfig(**{"max_prefill": 4, "max_decode": 4, **told, **scale})
    return serve_config(
        cluster=ClusterConfig(autoscale=autoscale, token_file="token"),
        decode=DecodeConfig(max_num_seqs=8),
    )


def busy(decode_workers: int, sequences: int) -> State:
    """A frontend whose decode workers have much to do."""
    load = Load(7, sequences=sequences, pages=100 * decode_workers, decode_workers=decode_workers)
    return State({}, load)


def test_there_are_more_workers_when_they_are_needed(api: Api) -> None:
    scaler = Scaler(config(), api.scales, lambda _: busy(api.sizes[DECODE], 30), lambda: ["a:1"])
    now = 0.0
    while not api.changes and now < 600:
        scaler.turn(now)
        now += 5.0
    assert api.changes == [(DECODE, 2)]
    # Somebody else has changed it: that is what there is.
    api.sizes[DECODE] = 4
    for _ in range(40):
        scaler.turn(now)
        now += 5.0
    assert api.sizes[DECODE] <= 4
    assert all(path != PREFILL for path, _ in api.changes)


def test_nothing_is_changed_while_something_is_not_known(api: Api) -> None:
    def silent(address: str) -> State:
        raise NoAnswerError(f"{address}: refused")

    scaler = Scaler(config(), api.scales, silent, lambda: ["a:1"])
    with pytest.raises(NoAnswerError, match="a:1: refused"):
        scaler.turn(0.0)
    warming = Scaler(config(), api.scales, lambda _: State({}, None), lambda: ["a:1"])
    for now in range(0, 600, 5):
        warming.turn(float(now))
    api.broken = True
    with pytest.raises(ApiError, match=r"GET .*/statefulsets/pshare-prefill/scale: 403"):
        warming.turn(600.0)
    assert api.changes == []


def test_what_is_not_there_is_named(api: Api) -> None:
    with pytest.raises(ApiError, match=r"leaderworkerset.x-k8s.io/v1/.*/other/scale: 404"):
        api.scales.size("leaderworkersets/other")
    with pytest.raises(ConfigError, match="`kubernetes` runs in a pod with a service account"):
        Scales(api.account, {})
    (api.account / "token").write_text("another one")
    with pytest.raises(ApiError, match="403"):
        api.scales.size("statefulsets/pshare-decode")
    (api.account / "token").write_text(TOKEN)
    assert api.scales.size("statefulsets/pshare-decode") == 1


def test_what_must_be_configured() -> None:
    check_kubernetes(config())
    with pytest.raises(ConfigError, match=r"set cluster.autoscale.max_prefill and max_decode"):
        check_kubernetes(config(max_prefill=0, max_decode=0))
    wrong = ClusterConfig(
        autoscale=AutoscaleConfig(max_decode=2),
        token_file="token",
        kubernetes=KubernetesConfig(decode="deployments/x"),
    )
    with pytest.raises(ConfigError, match=r"cluster.kubernetes.decode: 'deployments/x' must be"):
        check_kubernetes(serve_config(cluster=wrong))
    with pytest.raises(ConfigError, match=r"cluster.token_file"):
        check_kubernetes(
            serve_config(cluster=ClusterConfig(autoscale=AutoscaleConfig(max_decode=2)))
        )
