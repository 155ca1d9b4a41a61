"""Rule 3: a context is prefilled once, whoever asks about it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from msgspec.structs import astuple

from pshare_jax.core.requests import PromptUsage
from tests.engine.harness import Client, Models, Reply

SHARED = ("identity", "full", "full-tail2", "lora", "lora-tail5")
ENGINES = ("client", "client2x2")
PAGE_BYTES = 2 * 2 * 2 * 8 * 16 * 4


def prompt_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def usage_of(reply: Reply) -> PromptUsage:
    usage = reply.wait().usage
    assert usage is not None
    return usage


@pytest.fixture
def salt(request: pytest.FixtureRequest) -> str:
    """A tenant a test, so that no prompt happens to begin like one of another test."""
    return request.node.nodeid


@pytest.mark.parametrize("length", [2, 8, 9, 10, 16, 17, 30, 33, 41])
def test_rule_3_computed_once(client: Client, models: Models, length: int, salt: str) -> None:
    prompt = prompt_of(length, length)
    first = usage_of(client.submit("full", prompt, cache_salt=salt))
    assert astuple(first)[:4] == (length, length - 1, 0, 0)
    computed = client.computed()
    before = client.engine.stats().prefill_tokens
    for name in ("identity", "lora", "full-tail2"):
        cover = length - models.tails[name]
        usage = usage_of(client.submit(name, prompt, cache_salt=salt))
        assert astuple(usage)[:4] == (length, 0, cover, cover)
        source = (name, "other_model")
        assert client.engine.stats().prefill_tokens[source] - before.get(source, 0) == cover
    own = usage_of(client.submit("full", prompt, cache_salt=salt))
    assert astuple(own)[:4] == (length, 0, length - 1, 0)
    assert client.computed() == computed


@pytest.mark.parametrize("engines", ENGINES)
def test_rule_3_growing_context(engines: str, salt: str, request: pytest.FixtureRequest) -> None:
    """Agents in turn extend one context by each other's answers: each token is computed once."""
    client: Client = request.getfixturevalue(engines)
    before = client.computed()
    context = prompt_of(100, 13)
    for turn, name in enumerate(itertools.islice(itertools.cycle(SHARED), 12)):
        context += client.generate(name, context, 4, cache_salt=salt).tokens
        context += prompt_of(200 + turn, turn % 4)
    client.generate("identity", context, 2, cache_salt=salt)
    assert client.computed() - before == len(context) - 1


@pytest.mark.parametrize("engines", ENGINES)
@pytest.mark.parametrize("length", [10, 17, 22, 49])
def test_rule_3_fan_out(
    engines: str, length: int, salt: str, request: pytest.FixtureRequest
) -> None:
    """Four models are asked the same at once."""
    client: Client = request.getfixturevalue(engines)
    before = client.computed()
    prompt = prompt_of(300 + length, length)
    names = ("identity", "full", "lora", "full-tail2")
    replies = [client.submit(name, prompt, cache_salt=salt) for name in names]
    assert sum(usage_of(reply).computed_tokens for reply in replies) == length - 1
    assert client.computed() - before == length - 1


def test_a_fan_out_takes_its_pages_once(client: Client, salt: str) -> None:
    """It does not push other contexts out with pages that it will not need."""
    other, prompt = prompt_of(1, 120), prompt_of(2, 100)
    client.generate("full", other, 1, cache_salt=salt)
    replies = [client.submit(n, prompt, 1, cache_salt=salt) for n in SHARED[:4]]
    for reply in replies:
        reply.wait()
    # 15 and 13 of 39 pages are taken.
    assert usage_of(client.submit("full", other, 1, cache_salt=salt)).computed_tokens == 0


@pytest.mark.parametrize("engines", ENGINES)
def test_rule_3_interleaved_sessions(
    engines: str, salt: str, request: pytest.FixtureRequest
) -> None:
    """Three contexts grow at the same time, each asked about by several models at once."""
    client: Client = request.getfixturevalue(engines)
    before = client.computed()
    contexts = [[i, *prompt_of(400 + i, 9 + 2 * i)] for i in range(3)]
    for turn in range(4):
        names = SHARED[turn % 3 : turn % 3 + 2]
        replies = [[client.submit(name, c, 3, cache_salt=salt) for name in names] for c in contexts]
        for context, both in zip(contexts, replies, strict=True):
            context += [token for reply in both for token in reply.wait().tokens]
    for context in contexts:
        client.generate("identity", context, 1, cache_salt=salt)
    assert client.computed() - before == sum(len(context) - 1 for context in contexts)


def test_only_pages_that_the_decode_pool_lacks_are_moved(client: Client, salt: str) -> None:
    prompt = prompt_of(500, 41)
    asked = [("full", prompt), ("lora", prompt), ("identity", prompt[:37])]
    moved = [usage_of(client.submit(*a, cache_salt=salt)).handoff_bytes for a in asked]
    # 40 tokens are five full pages of 8: the second model finds them all. 36 tokens are four of
    # them and a half-filled one, which is the sequence's own.
    assert moved == [5 * PAGE_BYTES, 0, PAGE_BYTES]


def test_isolated_models_share_nothing(client: Client, models: Models, salt: str) -> None:
    prompt = prompt_of(600, 20)
    client.generate("full", prompt, cache_salt=salt)
    for name in ("isolated", "isolated-lora"):
        for cached in (0, len(prompt) - models.tails[name]):
            reply = client.generate(name, prompt, cache_salt=salt)
            usage = usage_of(reply)
            assert (usage.cached_tokens, usage.shared_tokens) == (cached, 0)
            assert reply.tokens == models.expected(name, prompt)


def test_tenants_share_nothing(client: Client, models: Models, salt: str) -> None:
    """Requests of different `cache_salt` never see each other's pages, in either pool."""
    prompt = prompt_of(700, 20)
    for tenant in ("a", "b"):
        reply = client.generate("full", prompt, cache_salt=salt + tenant)
        usage = usage_of(reply)
        assert (usage.cached_tokens, usage.handoff_bytes) == (0, 3 * PAGE_BYTES)
        assert reply.tokens == models.expected("full", prompt)
