"""Workers of several processes that Ray places, with the tiny model: `decode.hosts`."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.e2e.test_cluster import Stream, body_of, read
from tests.e2e.test_gang import NUMBERS, expected, settings_of
from tests.engine.harness import wait_until
from tests.ray.test_ray_cluster import SECONDS, free_port, launched

pytestmark = pytest.mark.ray

__all__ = ["expected"]


class Cluster(NamedTuple):
    config: Path
    url: str

    def members(self) -> dict[int, int]:
        """The processes of the decode worker, by rank."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = path.read_text().split("\0")
            except OSError:
                continue
            if "pshare_jax.serve.detached" not in command and f"--config={self.config}" in command:
                ranks = [re.fullmatch(r"--gang-rank=(\d)", flag) for flag in command]
                found.update({int(rank[1]): int(path.parent.name) for rank in ranks if rank})
        return found

    def answers(self) -> dict[int, str]:
        return {number: read(self.url, body_of(number), Stream()).text for number in NUMBERS}


@pytest.fixture(scope="module")
def cluster(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A decode worker of two processes, and a prefill worker of one, whose mesh is as large."""
    settings = settings_of(tiny_folder)
    settings["decode"]["hosts"] = 2
    settings["cluster"] = {
        "lost_seconds": 10.0,
        "max_attempts": 40,
        "ray": {"name": f"gang{os.getpid()}"},
    }
    config = tmp_path_factory.mktemp("ray-gang") / "serve.yaml"
    config.write_text(yaml.safe_dump(settings))
    # One device a process, whatever this one has.
    env = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    port = free_port()
    with launched(config, port, env=env):
        yield Cluster(config, f"http://127.0.0.1:{port}")
    wait_until(lambda: not Cluster(config, "").members(), SECONDS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_gang_on_ray_answers_what_one_process_does(
    cluster: Cluster, expected: dict[int, str]
) -> None:
    assert cluster.members().keys() == {0, 1}
    assert cluster.answers() == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rank", [1, 0])
def test_one_of_them_is_killed_and_all_are_started_again(
    cluster: Cluster, expected: dict[int, str], rank: int
) -> None:
    """In the middle of a stream, which goes on with the same tokens."""
    before = cluster.members()
    assert before.keys() == {0, 1}
    killed: list[int] = []

    def kill(stream: Stream) -> None:
        if len(stream.ids) == 6 and not killed:
            killed.append(before[rank])
            os.kill(killed[0], signal.SIGKILL)

    assert read(cluster.url, body_of(1), Stream(), kill).text == expected[1]
    assert killed
    after = cluster.members()
    assert after.keys() == {0, 1}
    assert not {*after.values()} & {*before.values()}
    assert cluster.answers() == expected
