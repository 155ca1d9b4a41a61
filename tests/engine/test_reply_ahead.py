"""Replies prefilled ahead by a real engine: tokens are the oracle's, and the next call is short."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pshare_jax.config_files import load_serve_config
from pshare_jax.errors import ConfigError
from tests.engine.harness import PAGE, Client, Models, running, serve_config, wait_until

MAX_TOKENS = 11
TURNS = ("lora", "full", "identity", "lora-tail5", "isolated", "full-tail2")


@pytest.fixture(scope="module", params=["device_put", "same-mesh"])
def ahead(request: pytest.FixtureRequest, models: Models) -> Iterator[Client]:
    config = serve_config(reply_kv="ahead", connector=request.param)
    with running(models, config) as client:
        yield client


def prompt_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def covered_ahead(client: Client) -> int:
    return sum(client.engine.stats().ahead_tokens.values())


def test_turns_of_all_kinds_of_models_compute_only_what_was_appended(
    ahead: Client, models: Models
) -> None:
    context = prompt_of(1, 19)
    before, covered = covered_ahead(ahead), {}
    for turn, model in enumerate(TURNS):
        space = "own" if model == "isolated" else "base"
        reply = ahead.generate(model, context, MAX_TOKENS)
        assert reply.tokens == models.expected(model, context, MAX_TOKENS)
        usage, known, tail = reply.usage, covered.get(space, 0), models.tails[model]
        assert usage is not None
        assert usage.cached_tokens == min(known, len(context) - tail)
        assert usage.computed_tokens == len(context) - tail - usage.cached_tokens
        whole = len(context) + MAX_TOKENS
        before += whole - max(len(context) - tail, known)
        covered[space] = whole
        wait_until(lambda expected=before: covered_ahead(ahead) == expected)
        context = [*context, *reply.tokens, *prompt_of(100 + turn, 3)]
    assert sum(ahead.engine.stats().foreseen_tokens.values()) > 4 * MAX_TOKENS
    ahead.check_idle()


def test_replies_of_many_at_once_are_the_oracles_whatever_is_covered_meanwhile(
    ahead: Client, models: Models
) -> None:
    contexts = [prompt_of(10 + i, 2 * PAGE + i) for i in range(4)]
    for _ in range(3):
        pairs = [(model, context) for context in contexts for model in ("lora", "full")]
        replies = [ahead.submit(model, context, 5) for model, context in pairs]
        for (model, context), reply in zip(pairs, replies, strict=True):
            assert reply.wait().tokens == models.expected(model, context, 5)
        contexts = [[*context, *replies[2 * i].tokens, i] for i, context in enumerate(contexts)]
    assert ahead.engine.failed_workers == {}


def test_a_way_that_is_not_implemented_is_refused_by_name(models: Models) -> None:
    with (
        pytest.raises(ConfigError, match="reply_kv: `while-decoding` is not implemented"),
        running(models, serve_config(reply_kv="while-decoding")),
    ):
        pass


def test_off_is_off(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("base: b\nmodels: [{name: m}]\nreply_kv: off\n")
    assert load_serve_config(file).reply_kv == "off"
    assert load_serve_config(file, "--reply_kv=ahead").reply_kv == "ahead"
