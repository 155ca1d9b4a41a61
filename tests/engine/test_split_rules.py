"""Rule 2 for every split rule: the engine splits prompts where the oracle does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from pshare_jax.config import ServeConfig
from pshare_jax.core.split_rule import Invocation, LastMessage
from tests.engine.harness import Client, Models, lora_module, running, serve_config
from tests.helpers import tiny_config

USER, TOOL, CALL = (1, 2), (1, 3), (7, 9)
TEXT = np.random.default_rng(3).integers(10, 256, 60).tolist()
PROMPTS = {
    "one message": [*USER, *TEXT[:20]],
    "several messages": [*USER, *TEXT[:9], *TOOL, *TEXT[9:30], *USER, *TEXT[30:37]],
    "ends with an opening": [*TEXT[:25], *USER],
    "no message": TEXT[:30],
    "one call": [*TEXT[:17], *CALL, 4],
    "two calls": [*TEXT[:10], *CALL, *TEXT[10:24], *CALL, *TEXT[24:30]],
    "ends with a call": [*USER, *TEXT[:30], *CALL],
    "nothing but a call": [*CALL],
    "a broken call": [*TEXT[:11], 7, 8, 9],
    "one token": [5],
}


@pytest.fixture(scope="module")
def models() -> Models:
    config = tiny_config()
    models = Models(config)
    models.add_identity("identity")
    models.add_full("message", 1, tail=LastMessage((USER, TOOL)))
    models.add_lora(
        "message-lora",
        lora_module(config, 3, rank=2, targets=("q", "v", "down")),
        tail=LastMessage((USER, TOOL)),
    )
    models.add_lora(
        "activated", lora_module(config, 4, rank=4, targets=("q", "k", "o")), tail=Invocation(CALL)
    )
    models.add_lora("tail3", lora_module(config, 5, rank=2, targets=("up",)), tail=3)
    return models


@pytest.fixture(scope="module", params=["device_put", "same-mesh"])
def engine(models: Models, request: pytest.FixtureRequest) -> Iterator[Client]:
    config: ServeConfig = replace(serve_config(), connector=request.param)
    with running(models, config) as client:
        yield client


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_rule_2_oracle_of_every_split_rule(
    engine: Client, models: Models, prompt: list[int]
) -> None:
    replies = {name: engine.submit(name, prompt, 9) for name in models.rules}
    for name, reply in replies.items():
        assert reply.wait().tokens == models.expected(name, prompt, 9), name
        assert reply.usage is not None
        covered = reply.usage.computed_tokens + reply.usage.cached_tokens
        assert covered == models.rules[name].split(prompt).covered


def test_without_its_invocation_an_activated_module_answers_as_the_base(
    engine: Client, models: Models
) -> None:
    base = models.expected("identity", TEXT, 9)
    assert engine.generate("activated", TEXT, 9).tokens == base
    assert models.expected("activated", [*TEXT, *CALL], 9) != models.expected(
        "identity", [*TEXT, *CALL], 9
    )


def test_activated_modules_share_what_precedes_their_invocation(engine: Client) -> None:
    context = np.random.default_rng(8).integers(10, 256, 40).tolist()
    first = engine.generate("activated", [*context, *CALL, 5], 3, cache_salt="activated")
    assert first.usage is not None
    assert first.usage.computed_tokens == 40
    second = engine.generate("identity", [*context, 6], 3, cache_salt="activated")
    assert second.usage is not None
    assert (second.usage.computed_tokens, second.usage.shared_tokens) == (0, 40)
