"""From what frontends say to workers that come and go; nobody runs, and the clock is ours."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace as replace_load

from pshare_jax.config import ClusterConfig, DecodeConfig, ModelEntry, PrefillConfig, ServeConfig
from pshare_jax.core.autoscale import Split
from pshare_jax.core.load import Load
from pshare_jax.errors import ConfigError
from pshare_jax.launch_config import AutoscaleConfig, RayConfig
from pshare_jax.serve import launcher as launcher_module
from pshare_jax.serve import supervision
from pshare_jax.serve.frontend_client import NoAnswerError, State
from pshare_jax.serve.launcher import Launcher
from pshare_jax.serve.scaling import Scaling, check_autoscale
from pshare_jax.serve.supervision import BAD_CONFIG, Spec
from tests.serve.server import eventually

QUICK = AutoscaleConfig(
    max_prefill=4,
    max_decode=4,
    prefill_tokens_per_s=1000.0,
    decode_sequences=10.0,
    window=10.0,
    long_window=30.0,
    rise_seconds=10.0,
    fall_seconds=60.0,
    settle_seconds=20.0,
)


def config_of(scale: AutoscaleConfig = QUICK, **changes: Any) -> ServeConfig:
    config = ServeConfig(
        "nowhere",
        prefill=PrefillConfig(engines=1),
        decode=DecodeConfig(engines=1),
        cluster=ClusterConfig(launcher="local", frontends=2, autoscale=scale),
    )
    return replace(config, **changes)


class Cluster:
    """Frontends with a steady load, as they would tell of it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.computed = 0

    def play(
        self, scaling: Scaling, seconds: float, prefill: float = 0.0, decode: float = 0.0
    ) -> list[tuple[float, Split]]:
        """Changes during a time of a steady demand, in workers."""
        changes = []
        for _ in range(int(seconds / 5)):
            self.now += 5.0
            self.computed += int(5 * 1000 * prefill)
            half = int(10 * decode / 2)
            pages = (0, 400 * scaling.split.decode, scaling.split.decode)
            loads = [Load(i, 0, half, self.computed, 0.0, *pages) for i in range(2)]
            if (split := scaling.observe(self.now, loads)) is not None:
                changes.append((self.now, split))
        return changes


def test_workers_follow_the_load_up_soon_and_down_late() -> None:
    scaling, cluster = Scaling(config_of()), Cluster()
    grown = cluster.play(scaling, 300, prefill=0.5, decode=2.2)
    assert [split for _, split in grown] == [Split(1, 2), Split(1, 3)]
    assert grown[1][0] - grown[0][0] >= QUICK.settle_seconds
    assert cluster.play(scaling, 600, prefill=0.5, decode=2.2) == []
    shrunk = cluster.play(scaling, 900, prefill=0.5, decode=0.2)
    assert [split for _, split in shrunk] == [Split(1, 2), Split(1, 1)]
    assert shrunk[0][0] - 900 >= QUICK.fall_seconds


def test_no_more_and_no_fewer_than_are_allowed() -> None:
    scale = replace(QUICK, max_prefill=0, min_decode=2)
    scaling, cluster = Scaling(config_of(scale, decode=DecodeConfig(engines=2))), Cluster()
    cluster.play(scaling, 900, prefill=9.0, decode=30.0)
    assert scaling.split == Split(1, 4)
    cluster.play(scaling, 3600)
    assert scaling.split == Split(1, 2)


def test_with_a_number_of_devices_workers_change_sides() -> None:
    scale = AutoscaleConfig(**{**vars(QUICK), "devices": 6, "max_prefill": 0, "max_decode": 0})
    sides = {"prefill": PrefillConfig(engines=2), "decode": DecodeConfig(engines=4)}
    scaling, cluster = Scaling(config_of(scale, **sides)), Cluster()
    changes = cluster.play(scaling, 600, prefill=3.0, decode=1.0)
    assert [split for _, split in changes] == [Split(3, 3), Split(4, 2)]


def test_what_only_some_frontends_say_decides_nothing() -> None:
    """It would look like less than there is."""
    scaling, cluster = Scaling(config_of()), Cluster()
    cluster.play(scaling, 300, prefill=0.5, decode=2.2)
    before = scaling.split
    for second in range(300, 1200, 5):
        load = Load(0, 0, 0, cluster.computed, 0.0, 0, 400, 1)
        assert scaling.observe(float(second), [load, None]) is None
        assert scaling.observe(float(second), []) is None
    assert scaling.split == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"autoscale": replace(QUICK, max_decode=1, min_decode=2)}, "decode.engines"),
        ({"autoscale": replace(QUICK, min_prefill=0)}, "min_prefill"),
        ({"autoscale": AutoscaleConfig(devices=5)}, "cluster.autoscale.devices"),
        ({"autoscale": replace(QUICK, observe_seconds=0)}, "observe_seconds"),
        ({"pinned": True}, "models.one.decode_engines"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    config = config_of(changes.get("autoscale", QUICK))
    if changes.get("pinned"):
        config = replace(config, models=[ModelEntry("one", decode_engines=[0])])
    with pytest.raises(ConfigError, match=named):
        check_autoscale(config)
    check_autoscale(replace(config, cluster=ClusterConfig()))


@dataclass
class ScriptedProcess:
    """Ready at once, or never; ends when it is told to."""

    address: str
    pid: int
    code: int | None = None
    ready: bool = True
    asked: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def wait_until_ready(self) -> bool:
        return self.ready

    def wait(self) -> int:
        self.ended.wait(60)
        assert self.code is not None
        return self.code

    def terminate(self) -> None:
        self.asked.set()
        self.end(0)

    def kill(self) -> None:
        self.end(-9)

    def end(self, code: int) -> None:
        if self.code is None:
            self.code = code
        self.ended.set()


class ScriptedHost:
    """Where nothing runs. An address is known once a process is started, as with Ray."""

    def __init__(self) -> None:
        self.running: dict[str, ScriptedProcess] = {}
        self.started: list[str] = []
        self.refused: set[str] = set()
        self._pids = itertools.count(1)

    def reserve(self, spec: Spec) -> str:
        return ""

    def start(self, spec: Spec, cancelled: threading.Event) -> ScriptedProcess:
        pid = next(self._pids)
        process = ScriptedProcess(f"host:{pid}", pid)
        if spec.name in self.refused:
            process.ready = False
            process.end(BAD_CONFIG)
        self.running[spec.name] = process
        self.started.append(spec.name)
        return process

    def release(self, name: str) -> None:
        self.running.pop(name, None)

    def close(self) -> None:
        pass


class ScriptedClient:
    """Frontends that keep what they are told, and tell of a load."""

    def __init__(self) -> None:
        self.told: dict[str, list[str]] = {}
        self.loads: list[Load | None] = []
        self.silent: set[str] = set()
        self.looks = 0

    def state(self, address: str) -> State:
        self.looks += 1
        if address in self.silent:
            raise NoAnswerError(address)
        load = self.loads[0] if self.loads else None
        return State(dict.fromkeys(self.told.get(address, []), ""), load)

    def tell(self, address: str, workers: Sequence[str]) -> None:
        if address in self.silent:
            raise NoAnswerError(address)
        self.told[address] = list(workers)


class Scripted:
    """A launcher of processes that are none."""

    def __init__(self, folder: Path, scale: AutoscaleConfig = QUICK):
        token = folder / "token"
        token.write_text("a token that is long enough")
        self.host, self.client = ScriptedHost(), ScriptedClient()
        self.launcher = Launcher(config_of(scale), ["--config=x"], self.host, str(token))
        self.launcher._client = self.client  # type: ignore[assignment]

    def address(self, name: str) -> str:
        return self.host.running[name].address

    def knows(self, *names: str) -> Callable[[], bool]:
        """Whether all frontends know these workers, and no others."""

        def check() -> bool:
            if not {*names, "frontend0", "frontend1"} <= self.host.running.keys():
                return False
            wanted = {self.address(name) for name in names}
            frontends = [self.address(f"frontend{i}") for i in range(2)]
            return all(set(self.client.told.get(one, [])) == wanted for one in frontends)

        return check


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher_module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(supervision, "AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(supervision, "MAX_AGAIN_SECONDS", 0.02)
    monkeypatch.setattr(supervision, "_is_healthy", lambda address: True)


@contextmanager
def running(folder: Path, scale: AutoscaleConfig = QUICK) -> Iterator[Scripted]:
    """A launcher whose processes are all ready; at the end there are none."""
    one = Scripted(folder, scale)
    one.launcher.start()
    eventually(lambda: one.launcher.is_ready)
    one.launcher.announced()
    eventually(one.knows("prefill0", "decode0"))
    yield one
    one.launcher.stop()
    assert one.host.running == {}


@pytest.fixture
def scripted(tmp_path: Path, quick: None) -> Iterator[Scripted]:
    with running(tmp_path) as one:
        yield one


def test_the_launcher_does_what_the_load_asks_for(tmp_path: Path, quick: None) -> None:
    """More, then fewer; while a frontend says nothing, nothing."""
    moment = dict.fromkeys(("window", "long_window"), 0.02)
    moment |= dict.fromkeys(("rise_seconds", "fall_seconds", "settle_seconds"), 0.01)
    with running(tmp_path, replace(QUICK, observe_seconds=0.01, **moment)) as one:
        assert len(one.launcher.workers) == 2
        busy = Load(0, 0, 20, 0, 0.0, 0, 400, 1)
        one.client.loads = [busy]
        four = [f"decode{i}" for i in range(4)]
        eventually(one.knows("prefill0", *four))
        one.client.silent.add(one.address("frontend1"))
        one.client.loads = [replace_load(busy, sequences=0)]
        before = one.client.looks
        eventually(lambda: one.client.looks > before + 20)
        assert len(one.launcher.workers) == 5
        one.client.silent.clear()
        eventually(one.knows("prefill0", "decode0"))
        assert one.host.started.count("decode0") == 1


def test_frontends_start_with_the_workers_that_there_are(scripted: Scripted) -> None:
    assert set(scripted.host.started[:2]) == {"prefill0", "decode0"}
    (frontend, _) = scripted.launcher.frontends
    assert scripted.address("decode0") in frontend.spec.more[0]


def test_more_workers_are_made_known_once_they_are_ready(scripted: Scripted) -> None:
    scripted.launcher.scale(Split(2, 3))
    eventually(scripted.knows("prefill0", "prefill1", "decode0", "decode1", "decode2"))


def test_fewer_are_drained_before_frontends_hear_of_it(scripted: Scripted) -> None:
    scripted.launcher.scale(Split(1, 3))
    eventually(scripted.knows("prefill0", "decode0", "decode1", "decode2"))
    last = scripted.host.running["decode2"]
    scripted.launcher.scale(Split(2, 2))
    assert last.asked.is_set()
    assert last.code == 0
    eventually(scripted.knows("prefill0", "prefill1", "decode0", "decode1"))
    assert scripted.host.started.index("prefill1") > scripted.host.started.index("decode2")


def test_a_worker_that_comes_again_elsewhere_is_made_known(scripted: Scripted) -> None:
    before = scripted.host.running["decode0"]
    before.end(-9)
    eventually(lambda: scripted.host.running["decode0"] is not before)
    eventually(scripted.knows("prefill0", "decode0"))
    assert before.address not in scripted.launcher.members()


def test_a_frontend_that_did_not_listen_is_told_later(scripted: Scripted) -> None:
    deaf = scripted.address("frontend1")
    scripted.client.silent.add(deaf)
    scripted.launcher.scale(Split(1, 2))
    worker = scripted.address("decode1")
    eventually(lambda: worker in scripted.client.told[scripted.address("frontend0")])
    assert worker not in scripted.client.told[deaf]
    scripted.client.silent.clear()
    eventually(scripted.knows("prefill0", "decode0", "decode1"))


def test_one_that_cannot_run_ends_nobody_else(scripted: Scripted) -> None:
    scripted.host.refused.add("decode2")
    scripted.launcher.scale(Split(1, 3))
    eventually(lambda: len(scripted.launcher.workers) == 3)
    assert scripted.launcher.failed == ""
    eventually(scripted.knows("prefill0", "decode0", "decode1"))


def test_one_that_cannot_run_is_asked_for_again_if_it_is_needed() -> None:
    scaling, cluster = Scaling(config_of()), Cluster()
    cluster.play(scaling, 300, prefill=0.5, decode=2.2)
    assert scaling.split == Split(1, 3)
    scaling.have(Split(1, 2))
    assert [s for _, s in cluster.play(scaling, 300, prefill=0.5, decode=2.2)] == [Split(1, 3)]


@pytest.mark.parametrize(("one_port", "ports"), [(False, [8000, 8001]), (True, [8000, 8000])])
def test_frontends_that_have_a_host_each_have_one_port(
    tmp_path: Path, one_port: bool, ports: list[int]
) -> None:
    config = config_of()
    cluster = replace(config.cluster, launcher="ray", ray=RayConfig(one_port=one_port))
    (tmp_path / "token").write_text("a token that is long enough")
    launcher = Launcher(
        replace(config, cluster=cluster), [], ScriptedHost(), str(tmp_path / "token")
    )
    assert [frontend.spec.listen[1] for frontend in launcher.frontends] == ports


def test_replacing_all_goes_on_with_those_that_were_added(scripted: Scripted) -> None:
    scripted.launcher.scale(Split(1, 2))
    eventually(scripted.knows("prefill0", "decode0", "decode1"))
    before = dict(scripted.host.running)
    scripted.launcher.restart()
    assert all(scripted.host.running[name] is not process for name, process in before.items())
    eventually(scripted.knows("prefill0", "decode0", "decode1"))
    order = scripted.host.started[-5:]
    assert set(order[:2]) == {"prefill0", "decode0"}
    assert order[2:] == ["decode1", "frontend0", "frontend1"]
