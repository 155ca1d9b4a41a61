"""Grammars and other restrictions of tokens through whole engines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from pshare_jax.config import DecodeConfig, ServeConfig
from pshare_jax.core.constraints import GrammarSpec
from pshare_jax.core.messages import FinishReason
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.text.tokenizer import Tokenizer
from tests.engine.harness import Client, Models, lora_module, serve_config
from tests.helpers import tiny_config
from tests.text.tiny import write_byte_level

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["first", "second"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["kind", "count", "tags"],
    "additionalProperties": False,
}
JSON = GrammarSpec("json_schema", json.dumps(SCHEMA))
LETTERS = GrammarSpec("regex", "[a-d]{6,40}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def models(tokenizer: Tokenizer) -> Models:
    """More ids than the tokenizer has tokens, as models have."""
    config = tiny_config(vocab_size=tokenizer.vocab_size + 21)
    models = Models(config)
    models.add_identity("identity")
    models.add_full("full", 1)
    models.add_lora("lora", lora_module(config, 3, rank=2, targets=("q", "v")))
    return models


def one_step() -> DecodeConfig:
    return DecodeConfig(batch_buckets=[4], max_num_seqs=8, replay_buckets=[4], num_pages=28)


def started(models: Models, tokenizer: Tokenizer, config: ServeConfig) -> Iterator[Client]:
    engine = Orchestrator(config, models.base_source, models.sources, tokenizer)
    engine.start()
    try:
        yield Client(engine)
        assert engine.grammars is not None
        assert not engine.grammars._held
    finally:
        engine.stop()
    for cache in engine.caches.values():
        cache.check(idle=True)


@pytest.fixture(scope="module")
def client(models: Models, tokenizer: Tokenizer) -> Iterator[Client]:
    yield from started(models, tokenizer, serve_config(decode=one_step()))


@pytest.fixture(scope="module")
def together(models: Models, tokenizer: Tokenizer) -> Iterator[Client]:
    """Prefill and decode over one pool, four tokens a dispatch."""
    yield from started(models, tokenizer, serve_config(connector="same-mesh"))


def valid(tokenizer: Tokenizer, tokens: list[int]) -> Any:
    value = json.loads(tokenizer.decode(tokens[:-1], skip_special_tokens=False))
    jsonschema.validate(value, SCHEMA)
    return value


@pytest.mark.parametrize("model", ["identity", "full", "lora"])
@pytest.mark.parametrize("features", [{}, {"temperature": 1.0}, {"temperature": 0.9, "top_k": 5}])
def test_answers_follow_a_schema(
    client: Client, together: Client, tokenizer: Tokenizer, model: str, features: dict[str, Any]
) -> None:
    """The same tokens whoever computes them, alone or beside others."""
    params = {"grammar": JSON, "ignore_eos": False, **features}
    alone = [client.generate(model, PROMPT, 90, seed=i, **params) for i in range(3)]
    finished = [reply for reply in alone if reply.reason is FinishReason.STOP]
    assert finished
    for reply in finished:
        valid(tokenizer, reply.tokens)
    for engine in (client, together):
        free = engine.submit(model, PROMPT, 60)
        replies = [engine.submit(model, PROMPT, 90, seed=i, **params) for i in range(3)]
        assert [reply.wait().tokens for reply in replies] == [reply.tokens for reply in alone]
        assert free.wait().tokens == client.generate(model, PROMPT, 60).tokens


def test_nothing_compiles_after_warm_up(client: Client) -> None:
    before = client.engine.stats().compiles
    replies = [
        client.submit(model, PROMPT, 40, grammar=JSON, **features)
        for model in ("identity", "full", "lora")
        for features in ({}, {"temperature": 1.0, "logprobs": 2, "top_p": 0.9})
    ]
    replies += [client.submit("lora", PROMPT, 40), client.submit("lora", PROMPT, 9, min_tokens=4)]
    for reply in replies:
        assert reply.wait().error is None
    assert client.engine.stats().compiles == before


def test_a_preempted_answer_goes_on_as_it_would_have(client: Client) -> None:
    """Its grammar is taken up where the delivered tokens have left it."""
    params = {"grammar": LETTERS, "temperature": 1.0, "seed": 5, "frequency_penalty": 0.3}
    prompts = [[i, *PROMPT] for i in range(8)]
    alone = [client.generate("full", prompt, 60, **params).tokens for prompt in prompts]
    before = sum(client.engine.stats().preemptions.values())
    others = [client.submit("identity", [50 + i] * 30, 80) for i in range(3)]
    replies = [client.submit("full", prompt, 60, **params) for prompt in prompts]
    assert [reply.wait().tokens for reply in replies] == alone
    for other in others:
        other.wait()
    assert sum(client.engine.stats().preemptions.values()) > before
    assert all(len(tokens) > 6 for tokens in alone)


def test_what_has_no_choice_is_not_sampled(client: Client, tokenizer: Tokenizer) -> None:
    """A long forced text is computed in chunks; the text is the tokenizer's own spelling."""
    fixed = "the quick brown fox jumps over the lazy dog and then the dog sleeps"
    spec = GrammarSpec("regex", f"{fixed} [ab]{{3}}{fixed}")
    before = sum(client.engine.stats().forced_tokens.values())
    reply = client.generate("full", PROMPT, 100, grammar=spec, ignore_eos=False)
    text = tokenizer.decode(reply.tokens)
    assert re.fullmatch(spec.source, text)
    assert reply.reason is FinishReason.STOP
    assert sum(client.engine.stats().forced_tokens.values()) - before > len(reply.tokens) / 2
    with_logprobs = client.generate("full", PROMPT, 100, grammar=spec, logprobs=3)
    assert with_logprobs.tokens == reply.tokens
    assert len(with_logprobs.logprobs) == len(reply.tokens)
