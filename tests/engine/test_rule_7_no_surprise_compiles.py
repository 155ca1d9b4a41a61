"""Rule 7: after warm-up, nothing that a request can ask for compiles anything."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.config import ServeConfig
from tests.engine.harness import Client, Models, running, serve_config, two_by_two

FEATURES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"repetition_penalty": 1.2},
    {"presence_penalty": 0.5, "frequency_penalty": -0.5},
    {"logit_bias": {3: 5.0, 200: -100.0}},
    {"logprobs": 0},
    {"logprobs": 20, "temperature": 1.0},
    {"stop_token_ids": tuple(range(128))},
    {"cache_salt": "tenant"},
]


@pytest.mark.parametrize("config", [serve_config(), two_by_two()], ids=["1+1", "2+2"])
def test_rule_7_no_surprise_compiles(models: Models, config: ServeConfig) -> None:
    rng = np.random.default_rng(0)
    names = list(models.full_weights)
    context = rng.integers(0, 256, 100).tolist()
    with running(models, config) as client:
        for features in FEATURES:
            client.generate(names[rng.integers(len(names))], context[:12], 3, **features)
        replies = []
        for i in range(60):
            name, features = names[i % len(names)], FEATURES[i % len(FEATURES)]
            own = rng.integers(0, 256, 1 + i % 9).tolist()
            prompt = [*context[: (7 * i) % 90], *own]
            replies.append(client.submit(name, prompt, int(rng.integers(1, 28)), **features))
            if i % 7 == 6:
                client.abort(replies[rng.integers(len(replies))])
        for reply in replies:
            reply.wait(120)
        largest(client)
        crowd(client, names)
        stats = client.engine.stats()
    assert sum(stats.preemptions.values()) > 0
    assert stats.compiles == 0


def largest(client: Client) -> None:
    """Moves every page of the largest sequence there is, and evicts everything else."""
    for token in range(3):
        client.generate("full", [token] * 127, 1)


def crowd(client: Client, names: list[str]) -> None:
    """More long answers than the pool holds: preemption and replay."""
    for reply in [client.submit(name, [i] * 20, 100) for i, name in enumerate([*names, *names])]:
        reply.wait(120)


def test_the_counter_counts(client: Client) -> None:
    before = client.engine.stats().compiles
    jax.jit(lambda x: x * 3 + before)(jnp.zeros(17))
    assert client.engine.stats().compiles > before
