"""Decode modules that come and go while a cluster runs: at one frontend, for all of it."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pshare_jax.cluster.modules import ModuleEntry, ModuleTable
from pshare_jax.config import ModelEntry, ServeConfig
from pshare_jax.convert.orbax import write_decode, write_prefill
from pshare_jax.core.requests import FinishReason
from pshare_jax.engine.sources import checkpoint_sources
from pshare_jax.errors import CheckpointError, RequestError, UnknownModelError
from pshare_jax.models.decoder import init_weights
from tests.cluster.harness import Cluster, cluster_config, running_cluster
from tests.engine.harness import Client, Models, wait_until
from tests.helpers import tiny_config

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8]
ROOM = 3


class OnDisk:
    """A base that is served, and full modules that lie beside it; the oracle knows them, too."""

    tokenizer = None

    def __init__(self, folder: Path):
        config = tiny_config()
        self.folder = folder
        self.oracle = Models(config)
        files = {"tokenizer.json": b"{}"}
        base = write_prefill(folder / "base", config, init_weights(config, 0), files)
        for seed, name in enumerate(("full", "a", "b", "c"), start=1):
            self.oracle.add_full(name, seed)
            write_decode(folder / name, base, init_weights(config, seed), cache_conditioned=True)
        serve = ServeConfig(
            str(folder / "base"),
            [ModelEntry("base", "identity"), ModelEntry("full", str(folder / "full"))],
        )
        self.base_source, self.sources = checkpoint_sources(serve, None)
        self.oracle.add_identity("base")

    def expected(self, name: str, tokens: int = 8) -> list[int]:
        return self.oracle.expected(name, PROMPT, tokens)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> OnDisk:
    return OnDisk(tmp_path_factory.mktemp("modules"))


@pytest.fixture(scope="module")
def shared(disk: OnDisk, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    settings = {"decode": replace(cluster_config().decode, engines=1, max_full=ROOM)}
    folder = tmp_path_factory.mktemp("cluster")
    models: Any = disk
    with running_cluster(models, folder, prefill=1, frontends=2, settings=settings) as cluster:
        yield cluster
        cluster.check_idle()


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    """It serves the configured modules before and after each test, and nothing else takes room."""
    yield shared
    for name in list(shared.clients[0].engine.models):
        if name not in ("base", "full"):
            shared.clients[0].engine.unload_module(name)
    settled(shared, ["base", "full"])


def settled(cluster: Cluster, names: list[str]) -> None:
    """Soon all frontends serve these, and all decode workers have these alone."""
    for client in cluster.clients:
        wait_until(lambda client=client: sorted(client.engine.models) == sorted(names))
    for host in cluster.hosts.values():
        if host.role == "decode":
            wait_until(lambda host=host: places(host) == len(names))


def places(host: Any) -> int:
    """Places that full modules take, and the base."""
    return len(host.hosted.modules._hosted)


def load(cluster: Cluster, name: str, folder: Path, number: int = 0, **options: Any) -> None:
    """Loads a module at one frontend, and waits until the others serve it, too."""
    cluster.clients[number].engine.load_module(name, folder, **options)
    entry = cluster.clients[number].engine._modules._table.entries[name]
    for client in cluster.clients:
        wait_until(lambda client=client: served_id(client, name) == entry.id)


def served_id(client: Client, name: str) -> str:
    spec = client.engine._dispatcher._models.find(name)
    return "" if spec is None else spec.name


def test_what_one_frontend_loads_all_serve(cluster: Cluster, disk: OnDisk) -> None:
    first, second = cluster.clients
    load(cluster, "new", disk.folder / "a")
    for client in (first, second):
        assert list(client.engine.models) == ["base", "full", "new"]
        replies = [client.submit("new", PROMPT) for _ in range(4)]
        assert [reply.wait().tokens for reply in replies] == [disk.expected("a")] * 4
        assert client.generate("full", PROMPT).tokens == disk.expected("full")
    wait_until(lambda: first.engine.stats().generation_tokens.get("new") == 64)
    second.engine.unload_module("new")
    with pytest.raises(UnknownModelError):
        second.submit("new", PROMPT)
    settled(cluster, ["base", "full"])
    with pytest.raises(UnknownModelError):
        first.submit("new", PROMPT)


def test_all_frontends_read_and_write_calls_alike(cluster: Cluster, disk: OnDisk) -> None:
    """As it was said where the module was loaded; in place, as before where nothing is said."""

    def written() -> list[tuple[str, str]]:
        infos = [client.engine.models["new"] for client in cluster.clients]
        return [(info.tool_parser, info.reasoning) for info in infos]

    load(cluster, "new", disk.folder / "a", tool_parser="pythonic", reasoning="on")
    assert written() == [("pythonic", "on")] * 2
    load(cluster, "new", disk.folder / "b", 1, replace=True, reasoning="off")
    assert written() == [("pythonic", "off")] * 2
    load(cluster, "new", disk.folder / "a", replace=True, tool_parser="auto")
    assert written() == [("auto", "off")] * 2


def test_requests_go_on_with_what_they_had(cluster: Cluster, disk: OnDisk) -> None:
    """Replaced at one frontend and unloaded at the other, while replies are under way."""
    first, second = cluster.clients
    load(cluster, "new", disk.folder / "a")
    running = [client.submit("new", PROMPT, 80) for client in cluster.clients]
    for reply in running:
        reply.next_event()
    load(cluster, "new", disk.folder / "b", 1, replace=True)
    assert first.generate("new", PROMPT).tokens == disk.expected("b")
    assert second.generate("new", PROMPT).tokens == disk.expected("b")
    last = first.submit("new", PROMPT, 80)
    last.next_event()
    second.engine.unload_module("new")
    assert [reply.wait().tokens for reply in running] == [disk.expected("a", 80)] * 2
    assert last.wait().tokens == disk.expected("b", 80)
    settled(cluster, ["base", "full"])


def test_who_comes_later_knows(cluster: Cluster, disk: OnDisk) -> None:
    """A decode worker that has died loads it again, and a new frontend serves it."""
    load(cluster, "new", disk.folder / "a")
    for name in ("decode0", "decode1", "prefill0"):
        cluster.hosts[name].kill()
        cluster.again(name)
    late = cluster.frontend()
    wait_until(lambda: served_id(late, "new") == served_id(cluster.clients[0], "new"))
    settled(cluster, ["base", "full", "new"])
    for client in cluster.clients:
        assert client.generate("new", PROMPT).tokens == disk.expected("a")
    # What has been unloaded meanwhile does not come back with who was away.
    cluster.hosts["decode1"].kill()
    late.engine.unload_module("new")
    cluster.again("decode1")
    settled(cluster, ["base", "full"])
    late.engine.stop()
    cluster.clients.remove(late)


def test_a_frontend_that_dies_takes_nothing_along(cluster: Cluster, disk: OnDisk) -> None:
    late = cluster.frontend()
    load(cluster, "new", disk.folder / "c", 2)
    reply = late.submit("new", PROMPT, 80)
    reply.next_event()
    late.engine.stop()
    cluster.clients.remove(late)
    assert reply.wait().reason is FinishReason.ERROR
    assert cluster.clients[0].generate("new", PROMPT).tokens == disk.expected("c")
    cluster.clients[1].engine.unload_module("new")
    settled(cluster, ["base", "full"])


def test_what_cannot_be_loaded_leaves_nothing_behind(
    cluster: Cluster, disk: OnDisk, tmp_path: Path
) -> None:
    engine = cluster.clients[0].engine
    with pytest.raises(CheckpointError):
        engine.load_module("new", tmp_path)
    with pytest.raises(RequestError, match="'full' is served already"):
        engine.load_module("full", disk.folder / "a")
    with pytest.raises(RequestError, match="the base's own weights"):
        engine.load_module("base", disk.folder / "a", replace=True)
    for name in ("a", "b"):
        load(cluster, name, disk.folder / name)
    with pytest.raises(RequestError, match="there is room for 3") as caught:
        engine.load_module("c", disk.folder / "c")
    assert caught.value.code == "no_room"
    settled(cluster, ["base", "full", "a", "b"])
    # What workers find in the folder is not what the frontend has found there.
    shutil.copytree(disk.folder / "a", tmp_path / "a")
    source = engine._modules._source
    engine._modules._source = lambda entry: source(
        replace(entry, checkpoint=str(disk.folder / "b"))
    )
    engine.unload_module("a")
    settled(cluster, ["base", "full", "b"])
    with pytest.raises(CheckpointError, match="another module lies there by now"):
        engine.load_module("new", tmp_path / "a")
    engine._modules._source = source
    settled(cluster, ["base", "full", "b"])


def test_one_worker_that_has_room_is_enough(
    cluster: Cluster, disk: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one gets no request for it."""
    modules = cluster.hosts["decode0"].hosted.modules._modules
    assert modules is not None
    monkeypatch.setattr(modules, "_max_full", 1)
    load(cluster, "new", disk.folder / "a")
    client = cluster.clients[1]
    wait_until(
        lambda: served_id(client, "new") in client.engine._dispatcher._models._hosted["decode1"]
    )
    replies = [client.submit("new", PROMPT) for _ in range(6)]
    assert [reply.wait().tokens for reply in replies] == [disk.expected("a")] * 6
    assert places(cluster.hosts["decode0"]) == 2
    client.engine.unload_module("new")
    settled(cluster, ["base", "full"])


def test_changes_at_two_frontends_at_once(cluster: Cluster, disk: OnDisk) -> None:
    """Each of any modules under any of two names; in the end all agree on what is served."""
    answers = {tuple(disk.expected(name)) for name in ("a", "b", "c")}

    def change(number: int) -> None:
        rng, client = random.Random(number), cluster.clients[number]
        for _ in range(12):
            name, folder = rng.choice(("x", "y")), disk.folder / rng.choice("abc")
            # It may be there, be gone or find no room, by what the other one does.
            with contextlib.suppress(RequestError):
                if rng.random() < 0.6:
                    client.engine.load_module(name, folder, replace=rng.random() < 0.7)
                else:
                    client.engine.unload_module(name)
            with contextlib.suppress(UnknownModelError):
                reply = client.submit(name, PROMPT).wait()
                assert tuple(reply.tokens) in answers or "was unloaded" in str(reply.error)

    with ThreadPoolExecutor(2) as pool:
        for changes in [pool.submit(change, number) for number in range(2)]:
            changes.result()
    first, second = (client.engine._modules for client in cluster.clients)
    wait_until(lambda: first._table.entries == second._table.entries)
    served = {name: entry for name, entry in first._table.entries.items() if entry.id}
    for client in cluster.clients:
        for name in ("x", "y"):
            id = served[name].id if name in served else ""
            wait_until(lambda client=client, name=name, id=id: served_id(client, name) == id)
    settled(cluster, ["base", "full", *served])
    for name, entry in served.items():
        for client in cluster.clients:
            reply = client.generate(name, PROMPT)
            assert reply.tokens == disk.expected(Path(entry.folder).name)


def test_the_later_entry_holds_whoever_is_heard_first() -> None:
    old, new = ModuleEntry(5, "a@5", "folder"), ModuleEntry(7)
    for order in ((old, new), (new, old)):
        table = ModuleTable()
        news = [table.merge({"a": entry}) for entry in order]
        assert table.entries == {"a": new}
        assert news[1] == ({"a": new} if order[1] is new else {})
        assert table.merge({"a": new}) == {}
        assert not table.holds("a@5")
    table.merge({"a": ModuleEntry(2**63)})
    assert table.next_version("a") > 2**63
