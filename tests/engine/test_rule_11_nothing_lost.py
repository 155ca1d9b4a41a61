"""Rule 11: when a worker dies, every request ends once, with all its tokens or with the cause."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pshare_jax.core.requests import FinishReason
from pshare_jax.errors import EngineDeadError
from tests.engine.harness import Client, Models, Reply, running, two_by_two, wait_until
from tests.helpers import tiny_config

TOKENS = 30


@pytest.fixture(scope="module")
def two_models() -> Models:
    models = Models(tiny_config())
    models.add_full("full", 1)
    models.add_full("tail3", 2, tail=3)
    return models


def kill(client: Client, side: str, index: int, program: str, after: int = 0) -> None:
    """From its call number `after` on a program of a worker raises, its pool given away."""
    programs = getattr(client.engine.workers, side)[index].executor.programs
    plain, calls = getattr(programs, program), 0

    def fail(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        result = plain(*args)
        if calls > after:
            raise RuntimeError("the device is gone")
        return result

    setattr(programs, program, fail)


def ask(client: Client, count: int, seed: int) -> list[tuple[str, list[int], Reply]]:
    rng = np.random.default_rng(seed)
    asked = []
    for i in range(count):
        name = ("full", "tail3")[i % 2]
        prompt = rng.integers(0, 256, rng.integers(3, 40)).tolist()
        asked.append((name, prompt, client.submit(name, prompt, TOKENS)))
    return asked


def check_idle(client: Client, dead: str) -> None:
    for name, cache in client.engine.caches.items():
        if name != dead:
            cache.check(idle=True)


@pytest.mark.parametrize(
    ("side", "program", "after"),
    [
        ("decode", "decode", 5),
        ("decode", "scatter", 2),
        ("decode", "replay", 0),
        ("prefill", "chunk", 2),
        ("prefill", "gather", 1),
    ],
)
def test_rule_11_nothing_lost(two_models: Models, side: str, program: str, after: int) -> None:
    """Half-done requests go on elsewhere: each token once, and the oracle's."""
    with running(two_models, two_by_two()) as client:
        kill(client, side, 1, program, after)
        asked = ask(client, 12, seed=len(program))
        for name, prompt, reply in asked:
            reply.wait(120)
            assert reply.reason is FinishReason.LENGTH, reply.error
            assert reply.tokens == two_models.expected(name, prompt, TOKENS)
        failed = client.engine.failed_workers
        assert failed == {f"{side}1": "RuntimeError: the device is gone"}
        assert client.engine.dead is None
        check_idle(client, f"{side}1")
        # What comes later is not sent there any more.
        for name, prompt, reply in ask(client, 4, seed=99):
            assert reply.wait().tokens == two_models.expected(name, prompt, TOKENS)


def test_the_last_one_s_death_ends_all_with_the_cause(two_models: Models) -> None:
    with running(two_models, two_by_two()) as client:
        for index in range(2):
            kill(client, "decode", index, "decode", after=4)
        asked = ask(client, 12, seed=5)
        for name, prompt, reply in asked:
            reply.wait(120)
            expected = two_models.expected(name, prompt, TOKENS)
            assert reply.tokens == expected[: len(reply.tokens)]
            if reply.reason is not FinishReason.LENGTH:
                assert reply.reason is FinishReason.ERROR
                assert "the device is gone" in (reply.error or "")
        assert any(reply.reason is FinishReason.ERROR for *_, reply in asked)
        wait_until(lambda: set(client.engine.failed_workers) == {"decode0", "decode1"})
        assert "the device is gone" in (client.engine.dead or "")
        with pytest.raises(EngineDeadError, match="the device is gone"):
            client.submit("full", [1, 2, 3])
        for name in ("prefill0", "prefill1"):
            cache = client.engine.caches[name]
            wait_until(lambda cache=cache: cache.counts().used == 0)


def test_a_model_that_was_hosted_there_alone_is_refused_and_others_go_on(
    two_models: Models,
) -> None:
    models = Models(two_models.config)
    models.add_full("full", 1)
    models.add_full("alone", 2)
    models.sources[1] = replace(models.sources[1], decode_engines=(1,))
    with running(models, two_by_two()) as client:
        kill(client, "decode", 1, "decode")
        reply = client.submit("alone", [1, 2, 3], 5).wait()
        assert reply.reason is FinishReason.ERROR
        assert "the device is gone" in (reply.error or "")
        with pytest.raises(EngineDeadError, match=r"model alone has no worker left: decode1"):
            client.submit("alone", [1, 2, 3])
        assert client.engine.dead is None
        assert client.generate("full", [1, 2, 3]).tokens == models.expected("full", [1, 2, 3])
