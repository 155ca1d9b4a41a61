"""Workers that a name stands for: they come and go, and a name server's silence cuts nobody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from pshare_jax.cluster import links
from pshare_jax.cluster.discovery import Discovery, check_workers, resolve
from pshare_jax.errors import ConfigError
from tests.cluster.symbolic import Frontend, symbolic_cluster
from tests.engine.harness import wait_until

NAME = "dns:workers:7000"


class Names:
    """A name server."""

    def __init__(self) -> None:
        self.found: list[str] | OSError = []

    async def resolve(self, host: str, port: int) -> list[str]:
        assert host == "workers"
        if isinstance(self.found, OSError):
            raise self.found
        return [f"{found}:{port}" for found in self.found]


async def test_who_comes_and_goes() -> None:
    names = Names()
    names.found = ["a", "b"]
    discovery = Discovery(["x:1", NAME], names.resolve)
    assert (discovery.static, list(discovery.problems)) == (False, [NAME])
    assert await discovery.look([]) == ["x:1", "a:7000", "b:7000"]
    assert discovery.problems == {}
    names.found = ["b", "c"]
    assert await discovery.look({"b:7000"}) == ["x:1", "b:7000", "c:7000"]
    # One that drains has lost its address, and is linked for as long as it needs.
    names.found = ["c"]
    assert await discovery.look({"b:7000", "c:7000"}) == ["x:1", "c:7000", "b:7000"]
    assert await discovery.look({"c:7000"}) == ["x:1", "c:7000"]


async def test_a_name_server_that_does_not_answer_changes_nothing() -> None:
    names = Names()
    names.found = OSError(1, "it is away")
    discovery = Discovery([NAME], names.resolve)
    assert await discovery.look([]) == []
    assert discovery.problems == {NAME: "it is away"}
    names.found = ["a"]
    assert await discovery.look([]) == ["a:7000"]
    names.found = OSError(1, "it is away")
    assert await discovery.look([]) == ["a:7000"]
    assert discovery.problems == {}


def test_what_is_no_address_is_refused() -> None:
    check_workers(["127.0.0.1:9000", "dns:pshare-workers:7000"])
    with pytest.raises(ConfigError, match="'workers' is no address: write HOST:PORT"):
        check_workers(["dns:workers"])
    assert Discovery(["a:1"]).static


async def test_the_addresses_of_this_machine() -> None:
    assert await resolve("127.0.0.1", 80) == ["127.0.0.1:80"]


def test_a_frontend_finds_who_was_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes on when the name knows one no more."""
    monkeypatch.setattr(links, "LOOK_SECONDS", 0.05)
    there: list[str] = []

    class Named(Discovery):
        def __init__(self, entries: Sequence[str]):
            async def found(host: str, port: int) -> list[str]:
                return list(there)

            super().__init__(entries, found)

    with symbolic_cluster() as cluster:
        monkeypatch.setattr(links, "Discovery", Named)
        there += [cluster.hosts[name].address for name in ("prefill0", "decode0")]
        settings = replace(cluster.config.cluster, workers=[NAME])
        frontend = Frontend(replace(cluster.config, cluster=settings))
        cluster.frontends.append(frontend)
        frontend.start()
        frontend.submit("full", [5, 6, 7]).check()
        there.append(cluster.hosts["decode1"].address)
        wait_until(lambda: frontend.engine.workers() == dict.fromkeys(there, ""))
        # Its name goes first: it is linked for as long as it lives.
        gone = there.pop(1)
        frontend.submit("full", [8, 9]).check()
        assert frontend.engine.workers()[gone] == ""
        cluster.hosts.pop("decode0").kill()
        wait_until(lambda: frontend.engine.workers() == dict.fromkeys(there, ""))
        frontend.submit("tail3", [8, 9, 10]).check()
