"""Sampling parameters through a whole engine."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.core.requests import FinishReason
from pshare_jax.models.attention import CausalAttention
from pshare_jax.models.decoder import bind
from pshare_jax.models.weights import Weights
from tests.engine.harness import Client, Models

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
FEATURES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.05},
    {"temperature": 0.0, "repetition_penalty": 1.8},
    {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 1.0},
    {"temperature": 0.0, "logit_bias": {2: 3.0, 77: -100.0}},
]


def tokens_of(
    client: Client, model: str = "full", max_tokens: int = 14, **params: Any
) -> list[int]:
    return client.generate(model, PROMPT, max_tokens, **params).tokens


@pytest.mark.parametrize("model", ["full", "lora"])
def test_a_seed_fixes_the_tokens(client: Client, client2x2: Client, model: str) -> None:
    """Whatever else is in the batch, however many tokens a dispatch, whichever engine."""
    alone = [tokens_of(client, model, seed=i, **features) for i, features in enumerate(FEATURES)]
    for engine in (client, client2x2):
        for order in (1, -1):
            indices = list(range(len(FEATURES)))[::order]
            replies = {i: engine.submit(model, PROMPT, 14, seed=i, **FEATURES[i]) for i in indices}
            assert [replies[i].wait().tokens for i in sorted(replies)] == alone


def test_seeds_differ_and_none_is_random(client: Client) -> None:
    hot = {"temperature": 2.0}
    assert tokens_of(client, seed=1, **hot) == tokens_of(client, seed=1, **hot)
    assert tokens_of(client, seed=1, **hot) != tokens_of(client, seed=2, **hot)
    assert tokens_of(client, **hot) != tokens_of(client, **hot)


def test_a_negative_seed_is_a_seed(client: Client) -> None:
    assert tokens_of(client, seed=-3, temperature=2.0) == tokens_of(
        client, seed=-3, temperature=2.0
    )


def test_sampling_survives_preemption(client: Client, models: Models) -> None:
    """A replayed sequence goes on with the draws and the penalties it would have had."""
    params = {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.7, "repetition_penalty": 1.1}
    prompts = [[i, *PROMPT] for i in range(6)]
    alone = [client.generate("full", prompt, 100, **params).tokens for prompt in prompts]
    before = sum(client.engine.stats().preemptions.values())
    replies = [client.submit("full", prompt, 100, **params) for prompt in prompts]
    assert [reply.wait().tokens for reply in replies] == alone
    assert sum(client.engine.stats().preemptions.values()) > before


def test_logit_bias_forces_a_token(client: Client) -> None:
    assert tokens_of(client, temperature=1.0, logit_bias={42: 100.0}) == [42] * 14


def base_logits(models: Models, tokens: list[int]) -> np.ndarray:
    """Logits at every position from an ordinary forward pass of the base, `[T, V]` float64."""

    @jax.jit
    def forward(weights: Weights) -> jax.Array:
        decoder = bind(models.config, weights)
        positions = jnp.arange(len(tokens))[None]
        attention = CausalAttention(models.config)
        return decoder.logits(decoder.hidden(jnp.asarray([tokens]), positions, attention))[0]

    return np.asarray(forward(models.base), np.float64)


def test_penalties_see_every_token(client: Client, models: Models) -> None:
    """Those of the same dispatch too."""
    presence, frequency, repetition = 0.6, 0.4, 1.3
    reply = client.generate(
        "identity",
        PROMPT,
        30,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
    )
    tokens = [*PROMPT, *reply.tokens]
    logits = base_logits(models, tokens)
    for i in range(len(PROMPT), len(tokens)):
        row, output = logits[i - 1].copy(), tokens[len(PROMPT) : i]
        for token in set(tokens[:i]):
            row[token] *= 1 / repetition if row[token] > 0 else repetition
        for token in set(output):
            row[token] -= presence + frequency * output.count(token)
        assert tokens[i] == row.argmax()


def test_logprobs_are_the_log_softmax(client: Client, models: Models) -> None:
    """Checked with a model that is the base, whose logits an ordinary forward pass gives."""
    reply = client.generate(
        "identity", PROMPT, 9, temperature=1.2, seed=1, logprobs=3, presence_penalty=1.0
    )
    logits = base_logits(models, [*PROMPT, *reply.tokens])
    reference = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    assert len(reply.logprobs) == 9
    for i, (token, entry) in enumerate(zip(reply.tokens, reply.logprobs, strict=True)):
        row = reference[len(PROMPT) - 1 + i]
        assert entry.logprob == pytest.approx(row[token], abs=1e-4)
        assert [t for t, _ in entry.top] == np.argsort(-row)[:3].tolist()
        assert [p for _, p in entry.top] == pytest.approx(np.sort(row)[::-1][:3].tolist(), abs=1e-4)


def test_logprobs_only_for_those_who_ask(client: Client) -> None:
    replies = [client.submit("full", PROMPT, 6, logprobs=n) for n in (None, 0, 20)]
    shapes = [[len(entry.top) for entry in reply.wait().logprobs] for reply in replies]
    assert shapes == [[], [0] * 6, [20] * 6]
    assert replies[0].tokens == replies[2].tokens


def test_stop_tokens(client: Client, client2x2: Client) -> None:
    """The stop token is the last one, also when a dispatch has gone on after it."""
    free = tokens_of(client)
    for engine in (client, client2x2):
        for i in range(1, 8):
            reply = engine.generate("full", PROMPT, 14, stop_token_ids=(free[i],))
            first = free.index(free[i])
            assert reply.tokens == free[: first + 1]
            assert reply.reason is FinishReason.STOP
        unused = next(token for token in range(100) if token not in free)
        reply = engine.generate("full", PROMPT, 14, stop_token_ids=(unused,))
        assert (reply.tokens, reply.reason) == (free, FinishReason.LENGTH)
