"""Scores of a prompt's tokens: those with which the server would have generated them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pshare_jax.core.requests import FinishReason
from pshare_jax.errors import RequestError
from tests.engine.harness import Client, Models, Reply

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8]
NAMES = ["identity", "full", "full-tail2", "lora", "lora-tail5", "isolated", "isolated-lora"]


def check(reply: Reply, prompt: list[int], expected: np.ndarray, top: int) -> None:
    """The scores of a reply are the oracle's."""
    scores = reply.prompt_logprobs
    assert scores is not None
    assert len(scores) == len(prompt)
    assert scores[0] is None
    for position in range(1, len(prompt)):
        row, entry = expected[position], scores[position]
        assert entry.logprob == pytest.approx(row[prompt[position]], abs=1e-4)
        assert [t for t, _ in entry.top] == np.argsort(-row)[:top].tolist()
        values = np.sort(row)[::-1][:top].tolist()
        assert [value for _, value in entry.top] == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_the_oracles(client: Client, models: Models, name: str) -> None:
    reply = client.generate(name, PROMPT, 5, prompt_logprobs=3, cache_salt=name)
    check(reply, PROMPT, models.expected_scores(name, PROMPT), 3)
    assert reply.tokens == models.expected(name, PROMPT, 5)
    assert reply.logprobs == []
    client.check_idle()


def test_on_two_engines_each(client2x2: Client, models: Models) -> None:
    replies = {
        name: client2x2.submit(name, PROMPT, 3, prompt_logprobs=1) for name in ("full", "lora")
    }
    for name, reply in replies.items():
        check(reply.wait(), PROMPT, models.expected_scores(name, PROMPT), 1)
        assert reply.tokens == models.expected(name, PROMPT, 3)


def test_a_position_is_scored_as_the_server_generates_there(client: Client) -> None:
    """Greedy tokens that are read again as a prompt have the scores that they were chosen with."""
    prompt, scores = PROMPT[:9], []
    for _ in range(6):
        reply = client.generate("lora-tail5", prompt, 1, logprobs=0)
        scores.append(reply.logprobs[0].logprob)
        prompt = [*prompt, *reply.tokens]
    again = client.generate("lora-tail5", prompt, 0, prompt_logprobs=0).prompt_logprobs
    assert again is not None
    assert [entry.logprob for entry in again[9:]] == pytest.approx(scores, abs=1e-5)


def test_no_token_but_scores(client: Client, models: Models) -> None:
    reply = client.generate("lora", PROMPT, 0, prompt_logprobs=0, cache_salt="no token")
    check(reply, PROMPT, models.expected_scores("lora", PROMPT), 0)
    assert (reply.tokens, reply.reason) == ([], FinishReason.LENGTH)
    usage = reply.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.computed_tokens, usage.cached_tokens) == (19, 18, 0)


def test_neither_token_nor_scores(client: Client) -> None:
    reply = client.generate("lora", PROMPT, 0)
    assert (reply.tokens, reply.prompt_logprobs) == ([], None)
    assert reply.reason is FinishReason.LENGTH


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_a_prompt_of_one_token(client: Client, max_tokens: int) -> None:
    reply = client.generate("full", [7], max_tokens, prompt_logprobs=1)
    assert reply.prompt_logprobs == (None,)
    assert len(reply.tokens) == max_tokens


def test_a_prompt_that_fills_the_context(client: Client) -> None:
    reply = client.generate("full", PROMPT * 6 + PROMPT[:14], 0, prompt_logprobs=0)
    assert reply.prompt_logprobs is not None
    assert len(reply.prompt_logprobs) == 128


def test_probes_compute_nothing_and_are_not_counted(client: Client) -> None:
    before = client.engine.stats()
    reply = client.generate("full", PROMPT, 4, prompt_logprobs=2, cache_salt="counted once")
    after = client.engine.stats()

    def grown(counter: Callable) -> int:
        return sum(counter(after).values()) - sum(counter(before).values())

    assert grown(lambda stats: stats.finished) == 1
    assert grown(lambda stats: stats.prompt_tokens) == len(PROMPT)
    assert grown(lambda stats: stats.generation_tokens) == 4
    assert grown(lambda stats: stats.prefill_tokens) == len(PROMPT) - 1
    assert after.compiles == before.compiles
    assert reply.usage is not None
    assert reply.usage.computed_tokens == len(PROMPT) - 1


def test_many_at_once_and_others_beside(client: Client, models: Models) -> None:
    """Scores of a request do not depend on what else is asked, sampled or preempted meanwhile."""
    prompts = [[i, *PROMPT] for i in range(4)]
    replies = [client.submit("full", prompt, 2, prompt_logprobs=1) for prompt in prompts]
    plain = [client.submit("full", prompt, 30) for prompt in prompts]
    for prompt, reply, other in zip(prompts, replies, plain, strict=True):
        check(reply.wait(), prompt, models.expected_scores("full", prompt), 1)
        assert other.wait().tokens == models.expected("full", prompt, 30)
    client.check_idle()


def test_penalties_and_draws_do_not_touch_the_scores(client: Client, models: Models) -> None:
    params = {"temperature": 2.0, "seed": 3, "repetition_penalty": 1.5, "logit_bias": {5: 9.0}}
    reply = client.generate("lora", PROMPT, 6, prompt_logprobs=1, **params)
    check(reply, PROMPT, models.expected_scores("lora", PROMPT), 1)
    assert reply.tokens == client.generate("lora", PROMPT, 6, **params).tokens


def test_an_abort_ends_all_of_it(client: Client) -> None:
    for _ in range(5):
        reply = client.submit("full", PROMPT * 5, 20, prompt_logprobs=0)
        client.abort(reply)
        assert reply.wait().reason is FinishReason.ABORT
    assert client.generate("full", PROMPT, 1).reason is FinishReason.LENGTH
    client.check_idle()


@pytest.mark.parametrize("count", [-1, 21])
def test_how_many_alternatives(client: Client, count: int) -> None:
    with pytest.raises(RequestError, match="prompt_logprobs must be 0") as caught:
        client.submit("full", PROMPT, 1, prompt_logprobs=count)
    assert caught.value.param == "prompt_logprobs"
