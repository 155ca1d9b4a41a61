"""Meshes that change from decode to prefill and back while they serve."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from pshare_jax.cluster.limits import check_cluster
from pshare_jax.config import RouterConfig
from pshare_jax.core.router import NoWorkerError
from pshare_jax.errors import ConfigError
from tests.engine.harness import (
    Client,
    Models,
    Reply,
    held,
    running,
    serve_config,
    two_by_two,
    wait_until,
)
from tests.helpers import tiny_config

TOKENS = 40


@pytest.fixture(scope="module")
def some_models() -> Models:
    models = Models(tiny_config())
    models.add_full("full", 1)
    models.add_full("tail3", 2, tail=3)
    return models


@pytest.fixture(scope="module")
def either(some_models: Models) -> Iterator[Client]:
    """Three meshes, of which the first begins with prefill and the others with decode."""
    config = replace(two_by_two(), router=RouterConfig(roles="flexible", backlog_tokens=0))
    with running(some_models, replace(config, prefill=replace(config.prefill, engines=1))) as one:
        yield one


def ask(client: Client, count: int, seed: int) -> list[tuple[str, list[int], Reply]]:
    rng = np.random.default_rng(seed)
    asked = []
    for i in range(count):
        name = ("full", "tail3")[i % 2]
        prompt = rng.integers(0, 256, rng.integers(20, 40)).tolist()
        asked.append((name, prompt, client.submit(name, prompt, TOKENS)))
    return asked


def wait(asked: list[tuple[str, list[int], Reply]]) -> list[tuple[str, list[int], Reply]]:
    for *_, reply in asked:
        reply.wait()
    return asked


def moved(client: Client) -> int:
    return sum(worker.core.stats.moved_rows for worker in client.engine.workers.decode)


def test_tokens_are_the_oracles_through_a_migration(either: Client, some_models: Models) -> None:
    """Nothing is compiled, replayed or covered again, and the mesh covers prompts then."""
    start, before = either.engine.stats(), moved(either)
    with held(either, rows=2, number=2):
        asked = ask(either, 6, seed=1)
        wait_until(lambda: sum(either.engine.workers.decode[2].core.running().values()) >= 2)
        either.engine.give_mesh("prefill2")
        computed = either.computed()
    wait(asked)
    assert moved(either) - before >= 2
    assert either.engine.stats().failed_transfers == start.failed_transfers
    covered = sum(len(prompt) for _, prompt, _ in asked)
    assert either.computed() - computed <= covered, "no prompt is covered twice"
    asked += wait(ask(either, 6, seed=2))
    assert either.engine.workers.prefill[2].core.stats.prefill_tokens.total() > 0
    either.engine.give_mesh("decode2")
    asked += wait(ask(either, 6, seed=3))
    # The oracle compiles, too, so it comes last.
    assert either.engine.stats().compiles == start.compiles
    for name, prompt, reply in asked:
        assert reply.tokens == some_models.expected(name, prompt, TOKENS)
    wait_until(lambda: not any(w.core.held_ids() for w in either.engine.workers.prefill))
    either.check_idle()


def test_what_is_drawn_does_not_depend_on_where(either: Client) -> None:
    """Seeds, penalties and log-probabilities go along."""
    prompt = list(range(30))
    params = {"temperature": 1.0, "seed": 7, "presence_penalty": 0.5, "logprobs": 2}
    still = either.generate("full", prompt, TOKENS, **params)
    before = moved(either)
    for worker, twin in (("prefill1", "decode1"), ("prefill2", "decode2")):
        with held(either, number=int(worker[-1])):
            reply = either.submit("full", prompt, TOKENS, **params)
            other = either.submit("full", prompt, TOKENS, **params)
            number = int(worker[-1])
            wait_until(lambda n=number: either.engine.workers.decode[n].core.running())
            either.engine.give_mesh(worker)
        for one in (reply, other):
            one.wait()
            assert one.tokens == still.tokens
            assert [entry.logprob for entry in one.logprobs] == pytest.approx(
                [entry.logprob for entry in still.logprobs], abs=1e-5
            )
        either.engine.give_mesh(twin)
    assert moved(either) - before >= 1


def test_somebody_must_be_left(either: Client) -> None:
    with pytest.raises(NoWorkerError, match="without prefill0 nobody could cover prompts"):
        either.engine.give_mesh("decode0")
    with pytest.raises(NoWorkerError, match="no worker, alive, of a mesh that may do either"):
        either.engine.give_mesh("decode9")


def test_settings_that_cannot_be_flexible(some_models: Models) -> None:
    flexible = RouterConfig(roles="flexible")
    with (
        pytest.raises(ConfigError, match=r"router\.roles: `flexible` needs a mesh for each engine"),
        running(some_models, serve_config(router=flexible, connector="same-mesh")),
    ):
        pass
    with pytest.raises(ConfigError, match="is for meshes of one process"):
        check_cluster(serve_config(router=flexible))
    uneven = serve_config(router=flexible)
    uneven = replace(uneven, prefill=replace(uneven.prefill, tensor_parallel=2))
    with (
        pytest.raises(ConfigError, match=r"prefill\.tensor_parallel is 2 and"),
        running(some_models, uneven),
    ):
        pass
    with (
        pytest.raises(ConfigError, match=r"router\.policy: `load` needs a `kv_store\.path`"),
        running(some_models, serve_config(router=RouterConfig("load"))),
    ):
        pass
