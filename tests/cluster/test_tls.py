"""Processes that show certificates: links and pages, and who is not let in."""

from __future__ import annotations

import http.client
import socket
import ssl
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pshare_jax.cluster.gang import GangFollower, GangLeader
from pshare_jax.cluster.limits import check_cluster
from pshare_jax.cluster.tls import cluster_tls
from pshare_jax.config import ClusterConfig
from pshare_jax.errors import ConfigError, GangLostError
from pshare_jax.runtime.mirror import Run
from tests.cluster.harness import TOKEN, cluster_config, running_cluster
from tests.engine.harness import Models, wait_until
from tests.helpers import tiny_config


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def make_ca(folder: Path, name: str) -> Path:
    """A CA: its certificate; the key lies beside it."""
    cert = folder / f"{name}.crt"
    openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
        *("-subj", f"/CN={name}", "-days", "2"),
        *("-keyout", str(folder / f"{name}.key"), "-out", str(cert)),
    )
    return cert


def make_certificate(folder: Path, name: str, ca: Path) -> dict[str, str]:
    """What a process of that CA's cluster is told; its certificate names no host."""
    key, request, cert = (folder / f"{name}.{end}" for end in ("key", "csr", "crt"))
    openssl(
        *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
        *("-subj", f"/CN={name}", "-keyout", str(key), "-out", str(request)),
    )
    openssl(
        *("x509", "-req", "-in", str(request), "-CA", str(ca), "-days", "2"),
        *("-CAkey", str(ca.with_suffix(".key")), "-CAcreateserial", "-out", str(cert)),
    )
    return {"tls_cert": str(cert), "tls_key": str(key), "tls_ca": str(ca)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("tls")
    ours, others = make_ca(folder, "ours"), make_ca(folder, "others")
    stranger = make_certificate(folder, "stranger", others)
    return {
        "member": make_certificate(folder, "member", ours),
        # Believes our CA, and has nothing of it.
        "stranger": {**stranger, "tls_ca": str(ours)},
    }


def status(address: str, path: str, context: ssl.SSLContext) -> int:
    connection = http.client.HTTPSConnection(address, context=context, timeout=30)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}"})
        return connection.getresponse().status
    finally:
        connection.close()


def test_links_and_pages_go_by_tls(files: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """With names of no host, and between hosts; strangers learn that the process is there."""
    models = Models(tiny_config())
    models.add_full("full", 1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    member = files["member"]
    with running_cluster(models, tmp_path, prefill=1, decode=0, frontends=0, **member) as cluster:
        cluster.host("decode", "decode0", shm_path=str(elsewhere))
        client = cluster.frontend()
        prompt = list(range(40))
        assert client.generate("full", prompt).tokens == models.expected("full", prompt)
        wait_until(lambda: client.engine.stats().transfers == {("decode0", "http"): 1})
        assert client.engine.stats().failed_transfers == {"decode0": 0}

        address = cluster.hosts["prefill0"].address
        ours = cluster_tls(cluster.config.cluster)
        assert ours is not None
        nameless = ssl.create_default_context(cafile=member["tls_ca"])
        nameless.check_hostname = False
        assert status(address, "/health", nameless) == 200
        assert status(address, "/pages/0000000000000001", nameless) == 401
        assert status(address, "/pages/0000000000000001", ours.client) == 404

        config = cluster.config
        strange = replace(config, cluster=replace(config.cluster, **files["stranger"]))
        stranger = cluster.frontend(strange, ready=False)
        wait_until(lambda: len(stranger.engine.failed_workers) == 2)
        wait_until(lambda: all("not linked" not in w for w in reasons(stranger)))
        assert not stranger.engine.ready
        plain = replace(config, cluster=replace(config.cluster, tls_cert="", tls_key="", tls_ca=""))
        outsider = cluster.frontend(plain, ready=False)
        wait_until(lambda: all("not linked" not in w for w in reasons(outsider)))
        assert not outsider.engine.ready
        assert cluster.hosts["prefill0"].station.num_frontends == 1
        assert client.generate("full", prompt).tokens == models.expected("full", prompt)


def reasons(client: object) -> list[str]:
    return list(client.engine.failed_workers.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tls_ca": ""}, "cluster.tls_ca must be set too, since cluster.tls_cert is"),
        ({"tls_cert": "", "tls_ca": ""}, "cluster.tls_cert must be set too"),
        ({"tls_key": "none"}, "cluster.tls_key: none: No such file or directory"),
        ({"tls_ca": "none"}, "cluster.tls_ca: none: No such file or directory"),
    ],
)
def test_files_that_cannot_be_used(
    files: dict[str, dict[str, str]], change: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        cluster_tls(ClusterConfig(**{**files["member"], **change}))
    assert str(caught.value).startswith(message)


def test_a_key_for_a_ca_is_none(files: dict[str, dict[str, str]]) -> None:
    member = files["member"]
    with pytest.raises(ConfigError, match=r"cluster\.tls_ca: .*member.key"):
        cluster_tls(ClusterConfig(**{**member, "tls_ca": member["tls_key"]}))
    assert cluster_tls(ClusterConfig()) is None


def test_what_knows_no_tls_is_refused_with_it(files: dict[str, dict[str, str]]) -> None:
    with pytest.raises(ConfigError, match="`jax-transfer` knows no TLS"):
        check_cluster(cluster_config(transport="jax-transfer", **files["member"]))


def test_the_link_of_a_gang_goes_by_tls(files: dict[str, dict[str, str]]) -> None:
    """Who shows no certificate of the cluster is no process of the mesh, whatever it says."""
    tls = {name: cluster_tls(ClusterConfig(**given)) for name, given in files.items()}
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    leader = GangLeader(listener, 2, {}, tls=tls["member"])
    gathering = threading.Thread(target=leader.gather, daemon=True)
    gathering.start()
    lost: list[str] = []
    stranger = GangFollower(address, 1, 2, {}, tls=tls["stranger"])
    with pytest.raises(GangLostError):
        stranger.join(lost.append)
    stranger.close()
    assert gathering.is_alive()
    member = GangFollower(address, 1, 2, {}, tls=tls["member"])
    joining = threading.Thread(target=member.join, args=(lost.append,), daemon=True)
    joining.start()
    gathering.join(30)
    leader.start("127.0.0.1:9", lost.append, lambda: None)
    joining.join(30)
    leader.send(Run(1, "copy", [None], [], None, []))
    closing = threading.Thread(target=leader.close)
    closing.start()
    assert [run.number for run in member.calls()] == [1]
    member.close()
    closing.join(30)
    assert (lost, closing.is_alive()) == ([], False)
