"""Rule 9: usage accounts for every prompt token once, and the counters agree with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from pshare_jax.core.requests import FinishReason
from tests.engine.harness import Client, Models


@pytest.mark.parametrize("engines", ["client", "client2x2"])
def test_rule_9_honest_usage(engines: str, models: Models, request: pytest.FixtureRequest) -> None:
    client: Client = request.getfixturevalue(engines)
    rng = np.random.default_rng(0)
    context = rng.integers(0, 256, 60).tolist()
    names = list(models.tails)
    replies = []
    before = client.engine.stats()
    for i in range(40):
        prompt = [*context[: rng.integers(0, 60)], *rng.integers(0, 256, 1 + i % 3).tolist()]
        name = names[i % len(names)]
        replies.append((name, prompt, client.submit(name, prompt, 1 + i % 4)))
    totals: Counter[tuple[str, str]] = Counter()
    prompt_tokens: Counter[str] = Counter()
    generated: Counter[str] = Counter()
    handed: Counter[str] = Counter()
    for name, prompt, reply in replies:
        first = reply.next_event()
        assert first.usage is not None, "the first event carries the usage"
        usage = reply.wait().usage
        assert usage == first.usage
        tail = min(models.tails[name], len(prompt))
        assert usage.prompt_tokens == len(prompt)
        assert usage.computed_tokens + usage.cached_tokens + tail == len(prompt)
        assert 0 <= usage.shared_tokens <= usage.cached_tokens <= usage.prompt_tokens
        if name.startswith("isolated"):
            assert usage.shared_tokens == 0
        totals[name, "computed"] += usage.computed_tokens
        totals[name, "other_model"] += usage.shared_tokens
        totals[name, "same_model"] += usage.cached_tokens - usage.shared_tokens
        prompt_tokens[name] += len(prompt)
        generated[name] += len(reply.tokens)
        handed[name] += usage.handoff_bytes
    after = client.engine.stats()
    assert after.preemptions == before.preemptions, "a replay is counted, but is nobody's usage"
    assert growth(before.prefill_tokens, after.prefill_tokens) == +totals
    assert growth(before.prompt_tokens, after.prompt_tokens) == prompt_tokens
    assert growth(before.generation_tokens, after.generation_tokens) == generated
    assert growth(before.handoff_bytes, after.handoff_bytes) == +handed
    page_bytes = client.engine.workers.prefill[0].executor.programs.layout.bytes_per_page
    pages = growth(before.handoff_pages, after.handoff_pages)
    assert {name: n * page_bytes for name, n in pages.items()} == +handed
    asked = Counter((name, FinishReason.LENGTH) for name, _, _ in replies)
    assert growth(before.finished, after.finished) == asked


def growth(before: Mapping[Any, int], after: Mapping[Any, int]) -> Counter[Any]:
    """By how much each counter has grown, those that have not left out."""
    return Counter(after) - Counter(before)


def test_origin_of_a_token_is_the_model_that_had_it_computed(client: Client) -> None:
    """One page with tokens of three models: each is asked what it reuses."""
    context = [9, 8, 7, 6, 5, 4, 3, 2]
    salt = "origins"

    def shared(name: str, length: int) -> tuple[int, int, int]:
        usage = client.generate(name, context[:length], 1, cache_salt=salt).usage
        assert usage is not None
        return usage.computed_tokens, usage.cached_tokens, usage.shared_tokens

    assert shared("full", 3) == (2, 0, 0)
    assert shared("lora", 5) == (2, 2, 2)
    assert shared("identity", 8) == (3, 4, 4)
    assert shared("full", 8) == (0, 7, 5)
    assert shared("lora", 8) == (0, 7, 5)
    assert shared("identity", 8) == (0, 7, 4)
    # Branching off within the page: the copied tokens keep their origins.
    usage = client.generate("lora", [*context[:4], 0, 0, 0], 1, cache_salt=salt).usage
    assert usage is not None
    assert (usage.computed_tokens, usage.cached_tokens, usage.shared_tokens) == (2, 4, 2)
    usage = client.generate("full", [*context[:4], 0, 0, 0], 1, cache_salt=salt).usage
    assert usage is not None
    assert (usage.computed_tokens, usage.cached_tokens, usage.shared_tokens) == (0, 6, 4)
