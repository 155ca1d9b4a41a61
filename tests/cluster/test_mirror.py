"""What the first process of a mesh runs, another one runs, too: the same pages come of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import msgspec
import numpy as np
import pytest

from pshare_jax.core.requests import FinishReason
from pshare_jax.engine.hosted import HostedWorkers
from pshare_jax.runtime.mirror import OutOfStepError, Replay, Run
from tests.cluster.harness import Cluster, Host, running_cluster
from tests.engine.harness import Models, lora_module
from tests.helpers import tiny_config

TOKENS = 10


@pytest.fixture(scope="module")
def models() -> Models:
    config = tiny_config()
    models = Models(config)
    models.add_full("full", 1)
    models.add_lora("lora", lora_module(config, 3, rank=2, targets=("q", "v")), tail=3)
    return models


class Twin:
    """A worker's other process, here in the same one, which hears by way of bytes."""

    def __init__(self, first: HostedWorkers, models: Models):
        sides = (["prefill"] if first.prefill else []) + (["decode"] if first.decode else [])
        role: Any = "both" if len(sides) == 2 else sides[0]
        name = first.workers[0].name.rpartition(".")[2]
        self.hosted = HostedWorkers(first.config, role, name, models.base_source, models.sources)
        self.replay: Replay = self.hosted.replay()
        self.heard: list[Run] = []

    def hear(self, run: Run) -> None:
        self.heard.append(msgspec.msgpack.decode(msgspec.msgpack.encode(run), type=Run))
        self.replay.run(self.heard[-1])

    @property
    def pages(self) -> list[np.ndarray]:
        pool = self.hosted.workers[0].executor.pool
        pool.own()
        pages = pool.read(lambda arrays: [np.asarray(array) for array in arrays])
        pool.disown()
        return pages


@pytest.fixture(scope="module")
def twins() -> dict[str, Twin]:
    return {}


@contextmanager
def twinned(models: Models, twins: dict[str, Twin]) -> Iterator[None]:
    """Workers that are started meanwhile have a twin each, which hears all that they run."""
    plain = HostedWorkers.start

    def start(self: HostedWorkers, *arguments: Any) -> None:
        twin = twins[self.workers[0].name] = Twin(self, models)
        self.lead(twin.hear, lambda: None)
        plain(self, *arguments)

    HostedWorkers.start = start  # type: ignore[method-assign]
    try:
        yield
    finally:
        HostedWorkers.start = plain  # type: ignore[method-assign]
        for twin in twins.values():
            twin.hosted.stop()


@pytest.fixture(scope="module")
def cluster(
    models: Models, twins: dict[str, Twin], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """One prefill and one decode worker."""
    folder = tmp_path_factory.mktemp("cluster")
    with (
        twinned(models, twins),
        running_cluster(models, folder, prefill=1, decode=1) as cluster,
    ):
        yield cluster


def pages_of(host: Host) -> list[np.ndarray]:
    pool = host.hosted.workers[0].executor.pool
    return host.call(lambda: pool.read(lambda arrays: [np.asarray(array) for array in arrays]))


def test_the_twins_have_the_same_pages(
    cluster: Cluster, models: Models, twins: dict[str, Twin]
) -> None:
    """Greedy, seeded, and with masks that are known late; pages have gone from one to the other."""
    client = cluster.clients[0]
    prompt = np.random.default_rng(0).integers(0, 256, 50).tolist()
    replies = [
        client.submit("full", prompt, TOKENS),
        client.submit("lora", prompt[:33], TOKENS),
        client.submit("lora", prompt[:20], TOKENS, seed=5, temperature=1.0, top_k=30),
        client.submit("full", prompt[:40], TOKENS, allowed_token_ids=(3, 5, 7)),
    ]
    for reply in replies:
        assert reply.wait(120).reason is FinishReason.LENGTH, reply.error
    assert replies[0].tokens == models.expected("full", prompt, TOKENS)
    assert replies[1].tokens == models.expected("lora", prompt[:33], TOKENS)
    cluster.check_idle()
    for name, twin in twins.items():
        here = pages_of(cluster.hosts[name])
        assert any(array[1:].any() for array in here)
        for a, b in zip(here, twin.pages, strict=True):
            np.testing.assert_array_equal(a, b)
    programs = {name: {run.program for run in twin.heard} for name, twin in twins.items()}
    assert programs["prefill0"] == {"chunk", "copy", "gather", "checksum", "stage", "scatter"}
    assert programs["decode0"] == {
        *("admit", "replay", "decode", "choose", "stage", "checksum", "scatter", "gather"),
    }


def test_arrays_that_are_not_needed_any_more_are_forgotten(
    cluster: Cluster, twins: dict[str, Twin]
) -> None:
    client = cluster.clients[0]
    for number in range(3):
        client.generate("full", [number, 5, 6, 7, 8] * 4, 6)
    gc.collect()
    client.generate("full", [9, 8, 7], 4)
    assert {name: twin.replay.num_kept <= 4 for name, twin in twins.items()} == {
        "prefill0": True,
        "decode0": True,
    }


def test_a_call_that_is_not_the_next_one_is_refused(
    cluster: Cluster, twins: dict[str, Twin]
) -> None:
    twin = twins["decode0"]
    last = twin.heard[-1]
    with pytest.raises(OutOfStepError, match=f"call {last.number} has come after call"):
        twin.replay.run(last)
    unknown = msgspec.structs.replace(last, number=last.number + 1, program="other")
    with pytest.raises(OutOfStepError, match="other: no"):
        twin.replay.run(unknown)
    # Those two have the same number again.
    twin.replay._calls = last.number
    assert jax.tree.leaves(twin.pages)


def test_a_worker_that_does_both(models: Models, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Over one pool, in which ends of prompts are copied."""
    twins: dict[str, Twin] = {}
    folder = tmp_path_factory.mktemp("both")
    with (
        twinned(models, twins),
        running_cluster(models, folder, prefill=0, decode=0, frontends=0) as cluster,
    ):
        host = cluster.host("both", "engine0")
        client = cluster.frontend()
        prompt = list(range(60, 97))
        for name in ("full", "lora"):
            assert client.generate(name, prompt, 6).tokens == models.expected(name, prompt, 6)
        cluster.check_idle()
        (twin,) = twins.values()
        for a, b in zip(pages_of(host), twin.pages, strict=True):
            np.testing.assert_array_equal(a, b)
        assert {"chunk", "copy", "decode"} <= {run.program for run in twin.heard}
