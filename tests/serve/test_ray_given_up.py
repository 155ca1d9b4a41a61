"""Starts that are given up: what actors have begun ends with them. Without Ray, by a stand-in."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from pshare_jax.config import ClusterConfig, ServeConfig
from pshare_jax.serve import ray_actor, ray_host
from pshare_jax.serve.ray_actor import Job, Keeper, take_lock
from pshare_jax.serve.ray_host import RayHost
from pshare_jax.serve.supervision import Spec, StartError
from tests.serve.test_ray_actor import SERVES, alive


class Actor:
    """Calls methods of a keeper in the thread of `ray`, until it is killed."""

    def __init__(self, ray: FakeRay, job: Job):
        self._ray, self._keeper = ray, Keeper(job)
        self.is_killed = False

    def __getattr__(self, name: str) -> Any:
        def remote(*args: Any) -> concurrent.futures.Future[Any]:
            if self.is_killed:
                raise ConnectionError("the actor is dead")
            asked = getattr(self._keeper, name)(*args)
            return asyncio.run_coroutine_threadsafe(asked, self._ray.loop)

        return SimpleNamespace(remote=remote)


async def _others_done() -> None:
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})


class FakeRay:
    """As much of the module `ray` as starts need."""

    exceptions = SimpleNamespace(RayError=RuntimeError)
    util = SimpleNamespace(
        list_named_actors=lambda all_namespaces=False: [], placement_group_table=dict
    )

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.actors: list[Actor] = []
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def is_initialized(self) -> bool:
        return True

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(_others_done(), self.loop).result(60)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    def remote(self, kind: type[Keeper]) -> Any:
        del kind
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._make))

    def _make(self, job: Job) -> Actor:
        self.actors.append(Actor(self, job))
        return self.actors[-1]

    def get(self, answer: concurrent.futures.Future[Any], timeout: float | None = None) -> Any:
        return answer.result(timeout)

    def wait(
        self, answers: list[Any], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Any], list[Any]]:
        when = "ALL_COMPLETED" if num_returns == len(answers) else "FIRST_COMPLETED"
        done, missing = concurrent.futures.wait(answers, timeout, when)
        return list(done), list(missing)

    def kill(self, actor: Actor) -> None:
        actor.is_killed = True


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    monkeypatch.setattr(ray_actor.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(ray_host, "GIVE_UP_SECONDS", 60.0)
    monkeypatch.setattr(ray_actor, "_node_address", lambda: "127.0.0.1")
    ray = FakeRay()
    yield ray
    ray.close()
    for lock in tmp_path.glob("pshare-*/*/*.lock"):
        os.close(take_lock(lock, 0.0))


def test_a_process_that_was_being_started_when_it_was_not_wanted_any_more_is_ended(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled, given_up = threading.Event(), threading.Event()
    launch = ray_actor._launch

    def slowly(job: Job) -> tuple[str, str, IO[bytes]]:
        started = launch(job)
        cancelled.set()
        given_up.wait(60)
        return started

    end = Keeper.end

    async def ended(keeper: Keeper) -> None:
        given_up.set()
        await end(keeper)

    monkeypatch.setattr(ray_actor, "_launch", slowly)
    monkeypatch.setattr(Keeper, "end", ended)
    host = RayHost(ServeConfig("nowhere", cluster=ClusterConfig(launcher="ray")), ray)
    spec = Spec("decode0", (sys.executable, "-S", "-c", SERVES), ("127.0.0.1", 0), "up")
    with pytest.raises(StartError, match="not wanted"):
        host.start(spec, cancelled)
    (actor,) = ray.actors
    assert actor.is_killed
    pid = actor._keeper._pid
    assert pid
    assert not alive(pid)
