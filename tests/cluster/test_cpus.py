"""Lists of CPUs, and workers that are kept to them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pshare_jax.cluster.cpus import allowed_cpus, cpu_sets, format_cpus, kept_to, parse_cpus
from pshare_jax.cluster.limits import check_cluster
from pshare_jax.config import ServeConfig
from pshare_jax.errors import ConfigError
from pshare_jax.serve.launcher import Launcher, make_token
from pshare_jax.serve.local_host import LocalHost
from pshare_jax.serve.supervision import Child, Spec
from tests.cluster.harness import cluster_config

MINE = sorted(allowed_cpus())
FIRST, LAST = MINE[0], MINE[-1]


@pytest.mark.parametrize(
    ("text", "cpus", "again"),
    [
        ("0", {0}, "0"),
        ("0-3", {0, 1, 2, 3}, "0-3"),
        (" 8,2-3,4 ", {2, 3, 4, 8}, "2-4,8"),
    ],
)
def test_lists_are_those_of_linux(text: str, cpus: set[int], again: str):
    assert parse_cpus(text) == cpus
    assert format_cpus(cpus) == again


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1-", "0,,2", "0-3:2"])
def test_what_is_no_list_is_refused(text: str):
    with pytest.raises(ConfigError, match=r"cluster\.cpus: .* is no list of CPUs such as `0-15`"):
        parse_cpus(text)


def test_a_cpu_that_is_not_ours_is_refused():
    with pytest.raises(ConfigError, match=r"cluster\.cpus: '9999' names CPU 9999, which this"):
        cpu_sets([str(FIRST), "9999"])


@pytest.mark.parametrize("launcher", ["ray", "kubernetes"])
def test_other_launchers_have_ways_of_their_own(launcher: str):
    with pytest.raises(ConfigError, match=rf"cluster\.cpus: is for the local .*`{launcher}`"):
        check_cluster(cluster_config(launcher=launcher, cpus=["0"]))


def test_nodes_are_those_with_cpus_of_ours(tmp_path: Path):
    for node, text in {"node0": f"{FIRST}", "node1": "", "node2": "9998-9999"}.items():
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(text + "\n")
    assert cpu_sets(["numa"], tmp_path) == [{FIRST}]
    # A system that describes no nodes is one.
    assert cpu_sets(["numa"], tmp_path / "none") == [set(MINE)]
    assert cpu_sets([], tmp_path) == []


def test_the_launcher_itself_goes_on_everywhere():
    with kept_to(frozenset({LAST})):
        assert allowed_cpus() == {LAST}
    assert sorted(allowed_cpus()) == MINE


def test_a_worker_runs_on_its_cpus_after_a_restart_too():
    command = (sys.executable, "-S", "-c", "import time; print('up', flush=True); time.sleep(99)")
    spec = Spec("w", command, ("127.0.0.1", 0), "up", cpus=frozenset({LAST}))
    child = Child(spec, LocalHost(ServeConfig(base="b", models=[]).server), 0.0)
    child.start()
    try:
        for _ in range(2):
            assert child.is_ready.wait(60)
            assert child.pid is not None
            assert os.sched_getaffinity(child.pid) == {LAST}
            child.restart()
    finally:
        child.stop()
    assert sorted(allowed_cpus()) == MINE


def test_both_sides_are_on_all_sets(tmp_path: Path):
    """Two sets: one engine of each side on each."""
    config = cluster_config(launcher="local", cpus=[str(FIRST), str(LAST)])
    host = LocalHost(config.server)
    launcher = Launcher(config, [], host, make_token(tmp_path))
    try:
        cpus = {w.name: set(w.spec.cpus) for w in launcher.workers}
        assert [f.spec.cpus for f in launcher.frontends] == [frozenset()]
    finally:
        for child in launcher.children:
            host.release(child.name)
    prefill, decode = config.prefill.engines, config.decode.engines
    names = [f"prefill{i}" for i in range(prefill)] + [f"decode{i}" for i in range(decode)]
    assert cpus == {name: {(FIRST, LAST)[i % 2]} for i, name in enumerate(names)}
