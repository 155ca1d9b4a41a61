"""Processes that a real Ray places; programs without models stand for them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pshare_jax.config import ClusterConfig, DecodeConfig, ServeConfig, ServerConfig
from pshare_jax.errors import ConfigError
from pshare_jax.launch_config import RayConfig, RayResources
from pshare_jax.serve import supervision
from pshare_jax.serve.ray_host import _OWN, RayHost, _connect, ray_launcher
from pshare_jax.serve.supervision import Child, Spec, StartError
from tests.serve.server import eventually
from tests.serve.test_local_gang import MEETS, pids

pytestmark = pytest.mark.ray

SERVES = (
    "import os, signal, sys; "
    "sys.argv[-1].startswith('--listen-fd=') or sys.exit(2); "
    "print('up', flush=True); signal.pause()"
)
CONFIG = ServeConfig(
    "nowhere",
    decode=DecodeConfig(tensor_parallel=2, hosts=2),
    server=ServerConfig(drain_seconds=20.0),
    cluster=ClusterConfig(
        launcher="ray",
        ray=RayConfig(
            name=f"test{os.getpid()}", decode=RayResources(cpus=0.5, resources={"slot": 1})
        ),
    ),
)


OWN = (
    "import sys; from tests.ray.test_ray_host import CONFIG, _connect; "
    "print(_connect(CONFIG).get_runtime_context().gcs_address, flush=True); sys.stdin.read()"
)
"""A process with a Ray of its own: one that has jax in it should not fork."""


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A Ray that was started as a launcher does, and to which we connect."""
    before = dict(os.environ)
    os.environ["RAY_AUTH_TOKEN"] = "0" * 64
    os.environ |= _OWN
    command = [sys.executable, "-c", OWN]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        ray = _connect(replace(CONFIG, cluster=replace(CONFIG.cluster, ray_address=address)))
        yield ray
        ray.shutdown()
        process.communicate("")
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.fixture
def host(ray: Any) -> RayHost:
    return RayHost(CONFIG, ray)


def spec(name: str = "decode0", program: str = SERVES, hosts: int = 1) -> Spec:
    # The host adds a flag that workers know.
    command = (sys.executable, "-S", "-c", program)
    return Spec(name, command, ("127.0.0.1", 0), "up", hosts=hosts)


@pytest.fixture
def child(host: RayHost, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Child]]:
    monkeypatch.setattr(supervision, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(supervision, "MAX_AGAIN_SECONDS", 0.1)
    made: list[Child] = []

    def make(name: str = "decode0", program: str = SERVES, hosts: int = 1) -> Child:
        made.append(Child(spec(name, program, hosts), host, 20.0))
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.stop()


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def listening(pids: set[int]) -> set[str]:
    """Local addresses, as the kernel writes them, at which processes listen."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found


def descendants(pid: int) -> set[int]:
    found = {pid}
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in file.read_text().split():
            with contextlib.suppress(OSError):
                found |= descendants(int(child))
    return found


def test_nobody_elsewhere_can_reach_it(child: Callable[..., Child]) -> None:
    one = child()
    assert one.is_ready.wait(60)
    addresses = listening(descendants(os.getpid()))
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    assert addresses
    assert addresses <= loopback
    assert one.address.startswith("127.0.0.1:")


def test_a_ray_of_our_own_asks_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    known = "import os; from tests.ray.test_ray_host import CONFIG, _connect; _connect(CONFIG); "
    say = "print(os.environ['RAY_AUTH_MODE'], len(os.environ['RAY_AUTH_TOKEN']))"
    done = subprocess.run(
        [sys.executable, "-c", known + say], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["token", "64"]


def test_who_dies_is_started_again_by_another_actor(child: Callable[..., Child], ray: Any) -> None:
    one = child()
    assert one.is_ready.wait(60)
    pid = one.pid
    assert pid is not None
    (before,) = ray.util.list_named_actors()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: one.pid not in (None, pid) and one.is_ready.is_set())
    assert one.code == -signal.SIGKILL
    eventually(lambda: before not in ray.util.list_named_actors())
    one.stop()
    assert one.code == -signal.SIGTERM
    eventually(lambda: ray.util.list_named_actors() == [])


def test_an_actor_dies_and_its_process_goes_on_until_there_is_another(
    child: Callable[..., Child],
) -> None:
    one = child()
    assert one.is_ready.wait(60)
    pid = one.pid
    assert pid is not None
    (actor,) = (
        one
        for one in descendants(os.getpid())
        if Path(f"/proc/{one}/cmdline").read_text().startswith("ray::Keeper")
    )
    os.kill(actor, signal.SIGKILL)
    eventually(lambda: one.pid not in (None, pid) and one.is_ready.is_set())
    assert one.code == supervision.LOST
    assert not alive(pid)


def test_a_launcher_goes_on_with_what_another_has_left(host: RayHost, ray: Any) -> None:
    never = threading.Event()
    first = host.start(spec(), never)
    assert first.wait_until_ready()
    more = replace(spec(), more=("--not-the-same",))
    second = RayHost(CONFIG, ray).start(more, never)
    assert (second.address, second.pid) == (first.address, first.pid)
    assert second.wait_until_ready()
    # What is to run otherwise is not gone on with.
    third = RayHost(CONFIG, ray).start(spec(program=f"{SERVES}; 0"), never)
    assert third.pid != first.pid
    assert not alive(first.pid)
    # Nor is what is not wanted at all.
    RayHost(CONFIG, ray).retire_others(["decode1"])
    eventually(lambda: not alive(third.pid))


def groups(ray: Any) -> list[str]:
    """The placement groups that there are."""
    table = ray.util.placement_group_table().values()
    return [group["name"] for group in table if group["state"] != "REMOVED"]


def test_a_gang_has_a_group_and_is_started_again_whole(
    child: Callable[..., Child], ray: Any
) -> None:
    """Whichever of its processes dies; in the end nothing of it is left."""
    one = child(program=MEETS, hosts=2)
    for rank in (0, 1):
        assert one.is_ready.wait(60)
        before, (group,) = pids(one), groups(ray)
        assert group.startswith(f"{CONFIG.cluster.ray.name}/decode0/")
        assert len(set(before)) == 2
        os.kill(before[rank], signal.SIGKILL)
        eventually(lambda b=before: len(pids(one)) == 2 and not set(pids(one)) & set(b))
        assert not any(alive(pid) for pid in before)
        assert one.is_ready.wait(60)
        eventually(lambda g=group: len(groups(ray)) == 1 and g not in groups(ray))
    before = pids(one)
    one.stop()
    assert not any(alive(pid) for pid in before)
    eventually(lambda: groups(ray) == [] and ray.util.list_named_actors() == [])


def test_a_launcher_goes_on_with_a_gang_that_is_whole(host: RayHost, ray: Any) -> None:
    never, asked = threading.Event(), spec(program=MEETS, hosts=2)
    first = host.start(asked, never)
    assert first.wait_until_ready()
    second = RayHost(CONFIG, ray).start(asked, never)
    assert second.pids == first.pids  # type: ignore[attr-defined]
    assert second.address == first.address
    # One of which an actor has gone is ended, and its places are given back.
    (name,) = (one for one in ray.util.list_named_actors() if "decode0.1" in one)
    ray.kill(ray.get_actor(name))
    eventually(lambda: name not in ray.util.list_named_actors())
    third = RayHost(CONFIG, ray).start(asked, never)
    assert not set(third.pids) & set(first.pids)  # type: ignore[attr-defined]
    eventually(lambda: not any(alive(pid) for pid in first.pids))  # type: ignore[attr-defined]
    eventually(lambda: len(groups(ray)) == 1)
    RayHost(CONFIG, ray).retire_others([])
    eventually(lambda: groups(ray) == [] and ray.util.list_named_actors() == [])


def test_places_that_no_process_has_are_given_back(ray: Any) -> None:
    """Such as those of a launcher that has died before it made actors."""
    name = f"{CONFIG.cluster.ray.name}/decode0/0123"
    group = ray.util.placement_group([{"CPU": 0.1}] * 2, name=name, lifetime="detached")
    assert ray.wait([group.ready()], timeout=60)[0]
    RayHost(CONFIG, ray).retire_others([])
    eventually(lambda: groups(ray) == [])


@pytest.mark.parametrize("hosts", [1, 2])
def test_who_has_no_place_waits_until_it_is_not_wanted(ray: Any, hosts: int) -> None:
    nowhere = RayConfig(name=CONFIG.cluster.ray.name, prefill=RayResources(resources={"moon": 1}))
    host = RayHost(replace(CONFIG, cluster=replace(CONFIG.cluster, ray=nowhere)), ray)
    cancelled = threading.Event()
    threading.Timer(1.0, cancelled.set).start()
    with pytest.raises(StartError, match="not wanted"):
        host.start(spec("prefill0", hosts=hosts), cancelled)
    eventually(lambda: groups(ray) == [] and ray.util.list_named_actors() == [])


def test_a_port_that_is_taken_is_said(host: RayHost) -> None:
    never = threading.Event()
    first = host.start(spec(), never)
    port = int(first.address.rpartition(":")[2])
    taken = replace(spec("frontend0"), listen=("127.0.0.1", port))
    with pytest.raises(StartError, match="in use"):
        host.start(taken, never)
    first.terminate()
    assert first.wait() == -signal.SIGTERM


def test_a_name_that_is_a_path_is_refused() -> None:
    wrong = replace(CONFIG, cluster=replace(CONFIG.cluster, ray=RayConfig(name="../x")))
    with pytest.raises(ConfigError, match=r"cluster\.ray\.name"):
        ray_launcher(wrong, [])


def test_a_gang_that_asks_for_nothing_is_refused() -> None:
    ray = RayConfig(decode=RayResources(cpus=0))
    wrong = replace(CONFIG, cluster=replace(CONFIG.cluster, ray=ray))
    with pytest.raises(ConfigError, match=r"cluster\.ray\.decode: .* several hosts"):
        ray_launcher(wrong, [])


def test_other_hosts_need_a_token_that_they_have() -> None:
    config = replace(CONFIG, cluster=replace(CONFIG.cluster, ray_address="127.0.0.1:1"))
    with pytest.raises(ConfigError, match=r"cluster\.token_file"):
        ray_launcher(config, [])
