"""Whatever else happens in the engine, a sequence's tokens are those that it has alone.

Series of requests to all kinds of modules over pools that are far too small: greedy and sampled,
with penalties and log-probabilities, over shared and branching contexts, aborted at any time,
preempted and replayed. Each series is the same for the same seed; how its requests meet in the
engine is up to the machine, and must not matter.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest

from pshare_jax.core.requests import FinishReason
from tests.attack.bounds import SEEDS
from tests.engine.harness import Client, Reply, every_kind, running, serve_config

REQUESTS = 24
VOCABULARY = 256
SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.7, "seed": 11, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.2, "seed": 3, "min_p": 0.02, "repetition_penalty": 1.3},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5, "logprobs": 3},
    {"logit_bias": {5: 4.0, 9: -100.0}, "temperature": 0.9, "seed": 2**31},
]


@dataclass(frozen=True)
class Ask:
    model: str
    prompt: tuple[int, ...]
    max_tokens: int
    params: dict[str, Any]
    salt: str
    fate: str


def series(seed: int, models: list[str]) -> list[Ask]:
    """The requests of one attack."""
    rng = random.Random(f"chaos {seed}")
    contexts = [[rng.randrange(VOCABULARY) for _ in range(60)] for _ in range(3)]
    asks = []
    for _ in range(REQUESTS):
        context = rng.choice(contexts)
        tail = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(9))]
        prompt = (*context[: rng.randint(1, len(context))], *tail)
        asks.append(
            Ask(
                rng.choice(models),
                prompt,
                rng.choice((1, 2, 9, 30, 55)),
                rng.choice(SAMPLING),
                rng.choice(("", "", "tenant")),
                rng.choice(("live", "live", "live", "abort at once", "abort later")),
            )
        )
    return asks


def submit(client: Client, ask: Ask) -> Reply:
    return client.submit(ask.model, ask.prompt, ask.max_tokens, cache_salt=ask.salt, **ask.params)


@pytest.fixture(scope="module")
def engine():
    with running(every_kind(), serve_config()) as client:
        yield client
        # Their pools were too small indeed.
        assert sum(client.engine.stats().preemptions.values()) > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_tokens_are_those_of_the_sequence_alone(engine: Client, seed: int):
    asks = series(seed, list(every_kind().full_weights))
    rng = random.Random(seed)
    replies = []
    for ask in asks:
        replies.append(submit(engine, ask))
        if ask.fate == "abort at once":
            engine.abort(replies[-1])
        elif ask.fate == "abort later" or rng.random() < 0.1:
            victim = rng.randrange(len(replies))
            if asks[victim].fate == "abort later":
                if replies[victim].reason is None and rng.random() < 0.5:
                    replies[victim].next_event()
                engine.abort(replies[victim])
    for reply in replies:
        reply.wait(120)
    engine.check_idle()
    for ask, reply in zip(asks, replies, strict=True):
        if reply.reason is FinishReason.ABORT:
            assert ask.fate != "live"
        alone = submit(engine, ask).wait()
        assert alone.reason is FinishReason.LENGTH
        assert reply.tokens == alone.tokens[: len(reply.tokens)], ask
        assert reply.logprobs == alone.logprobs[: len(reply.logprobs)], ask
        if ask.fate == "live":
            assert len(reply.tokens) == ask.max_tokens
    engine.check_idle()
