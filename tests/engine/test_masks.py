"""Grammars and other restrictions of tokens through whole engines."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pshare_jax.cluster.worker import DecodeWorker
from pshare_jax.config import DecodeConfig, ServeConfig
from pshare_jax.core.constraints import GrammarSpec, Thoughts
from pshare_jax.core.messages import Abort
from pshare_jax.core.plans import DecodePlan, Landed
from pshare_jax.core.requests import FinishReason
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.errors import RequestError
from pshare_jax.runtime.executor import DecodeExecutor
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


def lose(worker: DecodeWorker[DecodeExecutor], after: int) -> list[int]:
    """Has a sequence go while its step number `after` is under way; which steps had whom."""
    steps: list[int] = []
    begin = worker.executor.begin

    def begin_and_lose(plan: DecodePlan) -> list[Landed]:
        landed = begin(plan)
        if plan.step is not None and len(steps) < after:
            steps.append(plan.step.rows[0].id)
            if len(steps) == after:
                worker.core.receive(Abort(steps[-1]))
        return landed

    worker.executor.begin = begin_and_lose  # type: ignore[method-assign]
    return steps


def test_a_row_that_has_gone_writes_nothing_into_its_slot(
    models: Models, tokenizer: Tokenizer
) -> None:
    """Its step may still be under way when the slot gets another sequence; what a grammar forces
    after that step's token is not told to the device any more."""
    slot = DecodeConfig(batch_buckets=[1], max_num_seqs=1, replay_buckets=[4], num_pages=28)
    forcing = GrammarSpec("regex", "[a-d]{3}the quick brown fox jumps over the lazy dog")
    for client in started(models, tokenizer, serve_config(decode=slot, connector="same-mesh")):
        expected = client.generate("full", PROMPT, 30).tokens
        # Of the third token, the last that is free.
        steps = lose(client.engine.workers.decode[0], after=3)
        first = client.submit("full", PROMPT, 60, grammar=forcing)
        second = client.submit("full", PROMPT, 30)
        assert second.wait().tokens == expected
        assert len(steps) == 3
        assert len(set(steps)) == 1
        client.abort(first)


def test_a_lost_worker_changes_nothing(models: Models, tokenizer: Tokenizer) -> None:
    """What it held is taken up by another one, grammar and all."""
    config = serve_config(
        decode=DecodeConfig(
            engines=2, batch_buckets=[4], max_num_seqs=8, replay_buckets=[4], num_pages=28
        )
    )
    params = {"grammar": LETTERS, "temperature": 1.0}
    for client in started(models, tokenizer, config):
        alone = [client.generate("full", PROMPT, 45, seed=i, **params).tokens for i in range(4)]
        executor = client.engine.workers.decode[0].executor

        def lose() -> Any:
            raise RuntimeError("the device is gone")

        executor.finish = lose  # type: ignore[method-assign]
        replies = [client.submit("full", PROMPT, 45, seed=i, **params) for i in range(4)]
        assert [reply.wait().tokens for reply in replies] == alone
        assert list(client.engine.failed_workers) == ["decode0"]


def test_restrictions_without_a_grammar(client: Client, tokenizer: Tokenizer) -> None:
    free = client.generate("full", PROMPT, 12).tokens
    changed = client.generate("full", PROMPT, 12, bad_words=((free[0],), (free[3],))).tokens
    assert {free[0], free[3]}.isdisjoint(changed)
    some = client.generate("full", PROMPT, 12, temperature=2.0, allowed_token_ids=(8, 9)).tokens
    assert set(some) == {8, 9}
    stopped = client.generate("full", PROMPT, 12, stop_token_ids=(free[2],))
    assert (stopped.reason, stopped.tokens) == (FinishReason.STOP, free[:3])
    held = client.generate("full", PROMPT, 12, stop_token_ids=(free[2],), min_tokens=6)
    assert len(held.tokens) >= 6
    assert free[2] not in held.tokens[:6]


def test_log_probabilities_are_those_without_the_mask(client: Client) -> None:
    """As in vLLM: of the model's own distribution, whatever was left out."""
    free = client.generate("full", PROMPT, 1, logprobs=5)
    other = free.logprobs[0].top[1]
    masked = client.generate("full", PROMPT, 1, logprobs=5, allowed_token_ids=(other[0],))
    assert masked.tokens == [other[0]]
    assert masked.logprobs[0].logprob == pytest.approx(other[1], abs=1e-5)
    tops = [dict(reply.logprobs[0].top) for reply in (masked, free)]
    assert tops[0] == pytest.approx(tops[1], abs=1e-5)


def test_thoughts_are_free_and_the_answer_is_not(client: Client, tokenizer: Tokenizer) -> None:
    close = tokenizer.encode("z")[0]
    thoughts = Thoughts(tokenizer.encode("y")[0], close, True)
    reply = client.generate(
        "full",
        PROMPT,
        60,
        temperature=1.0,
        seed=1,
        grammar=LETTERS,
        thoughts=thoughts,
        logit_bias={close: 8.0},
    )
    answer = tokenizer.decode(reply.tokens[reply.tokens.index(close) + 1 :])
    assert re.fullmatch("[a-d]{0,40}", answer)
    assert len(answer) > 5


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"min_tokens": 9}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"allowed_token_ids": (10_000,)}, "allowed_token_ids"),
        ({"stop_token_ids": (10_000,), "min_tokens": 2}, "stop_token_ids"),
        ({"stop_token_ids": (-1,), "min_tokens": 2}, "stop_token_ids"),
        ({"bad_words": ((),)}, "bad_words"),
        ({"bad_words": ((1, -1),)}, "bad_words"),
        ({"grammar": GrammarSpec("regex", "a(b")}, "grammar"),
    ],
)
def test_what_is_refused(client: Client, params: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        client.submit("full", PROMPT, 8, **params)
    assert caught.value.param == param


def test_a_module_ends_at_an_end_token_of_its_own(
    client: Client, models: Models, tmp_path: Path
) -> None:
    expected = models.expected("full", PROMPT, 6)
    end = expected[3]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    infos = client.engine._served.infos
    plain = infos["full"]
    assert client.generate("full", PROMPT, 6, ignore_eos=False).tokens == expected
    infos["full"] = dataclasses.replace(plain, tokenizer_folder=tmp_path)
    try:
        reply = client.generate("full", PROMPT, 6, ignore_eos=False)
    finally:
        infos["full"] = plain
    first = expected.index(end)
    assert (reply.tokens, reply.reason) == (expected[: first + 1], FinishReason.STOP)
    tokenizer = client.engine.tokenizer
    assert client.engine.tokenizer_of("full") is tokenizer
    assert client.engine.tokenizer_of("unknown") is tokenizer
