"""What the engine takes on, what it refuses, and what it tells about itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pshare_jax.core.requests import FinishReason
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.errors import (
    EngineDeadError,
    QueueFullError,
    RequestError,
    UnknownModelError,
)
from tests.engine.harness import Client, Models, held, running, serve_config, two_by_two, wait_until
from tests.helpers import tiny_config


@pytest.fixture(scope="module")
def one() -> Models:
    models = Models(tiny_config())
    models.add_full("full", 1)
    return models


@pytest.fixture(scope="module")
def small(one: Models) -> Iterator[Client]:
    with running(one, serve_config(max_queue=3)) as client:
        yield client


@pytest.mark.parametrize(
    ("prompt", "params", "param", "message"),
    [
        ([], {}, "prompt", "empty"),
        ([0, 256], {}, "prompt", "256 is out of range 0..255"),
        ([-1], {}, "prompt", "-1 is out of range"),
        ([1], {"max_tokens": -1}, "max_tokens", "at least 0"),
        ([1] * 100, {"max_tokens": 29}, "max_tokens", "100 tokens.*29.*128"),
        ([1], {"logit_bias": {256: 1.0}}, "logit_bias", "256"),
        ([1], {"logit_bias": {-1: 1.0}}, "logit_bias", "-1"),
        ([1], {"logit_bias": {1: float("nan")}}, "logit_bias", "finite"),
        ([1], {"logit_bias": dict.fromkeys(range(301), 1.0)}, "logit_bias", "300"),
        ([1], {"logprobs": 21}, "logprobs", "20"),
        ([1], {"logprobs": -1}, "logprobs", "20"),
        ([1], {"temperature": -0.1}, "temperature", "-0.1"),
        ([1], {"temperature": float("nan")}, "temperature", "nan"),
        ([1], {"top_p": 1.1}, "top_p", "1.1"),
        ([1], {"top_p": -0.1}, "top_p", "-0.1"),
        ([1], {"min_p": 2.0}, "min_p", "2.0"),
        ([1], {"top_k": -1}, "top_k", "-1"),
        ([1], {"top_k": 2**31}, "top_k", str(2**31)),
        ([1], {"repetition_penalty": 0.0}, "repetition_penalty", "0.0"),
        ([1], {"presence_penalty": float("inf")}, "presence_penalty", "inf"),
        ([1], {"frequency_penalty": 1e9}, "frequency_penalty", "1000000000.0"),
    ],
)
def test_what_can_never_be_served_is_refused(
    small: Client, prompt: list[int], params: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        small.submit("full", prompt, **params)
    assert caught.value.param == param
    small.check_idle()


def test_the_context_length_has_a_code_of_its_own(small: Client) -> None:
    with pytest.raises(RequestError) as caught:
        small.submit("full", [1] * 128, 1)
    assert caught.value.code == "context_length_exceeded"
    assert len(small.generate("full", [1] * 127, 1).tokens) == 1
    assert len(small.generate("full", [1], 127).tokens) == 127


def test_an_unknown_model(small: Client) -> None:
    with pytest.raises(UnknownModelError, match="'nobody'"):
        small.submit("nobody", [1])


def test_an_id_that_is_running_cannot_be_used_again(small: Client) -> None:
    with held(small):
        first = small.submit("full", [1], 100, id="twice")
        with pytest.raises(RequestError, match="twice"):
            small.submit("full", [1], id="twice")
    assert first.wait().reason is FinishReason.LENGTH


def test_a_full_queue(small: Client) -> None:
    """Requests that decode do not count as waiting."""
    with held(small):
        first = small.submit("full", [1], 100)
        wait_until(lambda: small.engine.stats().running == {"full": 1})
        waiting = [small.submit("full", [2, i], 2) for i in range(3)]
        assert small.engine.stats().running == {"full": 1}
        assert small.engine.stats().waiting == {"full": 3}
        with pytest.raises(QueueFullError, match="3 requests are waiting") as caught:
            small.submit("full", [3])
        assert caught.value.retry_after > 0
        small.abort(waiting[0])
    assert [reply.wait().reason for reply in (first, *waiting)].count(FinishReason.ABORT) == 1
    assert small.generate("full", [3]).reason is FinishReason.LENGTH
    small.check_idle()


def test_an_engine_that_is_not_started_serves_nothing(one: Models) -> None:
    engine = Orchestrator(serve_config(), one.base_source, one.sources)
    assert not engine.ready
    with pytest.raises(EngineDeadError, match="not running"):
        Client(engine).submit("full", [1])
    with pytest.raises(RuntimeError, match="tokenizer"):
        _ = engine.tokenizer
    engine.stop()


def test_a_model_decodes_where_it_is_hosted(one: Models) -> None:
    """Only there are its weights loaded."""
    models = Models(one.config)
    models.add_full("everywhere", 1)
    models.add_full("second", 2)
    models.sources[1] = replace(models.sources[1], decode_engines=(1,))
    with running(models, two_by_two()) as client:
        assert [list(w.executor._groups) for w in client.engine.workers.decode] == [
            ["full/everywhere"],
            ["full/everywhere", "full/second"],
        ]
        replies = [client.submit("second", [i] * 10) for i in range(4)]
        tokens = [reply.wait().tokens for reply in replies]
        assert tokens == [models.expected("second", [i] * 10) for i in range(4)]
        pools = client.engine.stats().pools
        assert pools["decode0"].free == pools["decode0"].total
        assert pools["decode1"].cached > 0


def test_models_and_stats(client: Client, models: Models) -> None:
    infos = client.engine.models
    assert list(infos) == list(models.tails)
    assert {name: info.tail for name, info in infos.items()} == models.tails
    assert {info.parent for info in infos.values()} == {"base"}
    assert (infos["isolated"].sharing, infos["lora"].kind) == ("isolated", "lora")
    prompt = [5] * 20
    with held(client):
        replies = [client.submit(n, prompt, 50) for n in ("full", "lora")]
        wait_until(lambda: sum(client.engine.stats().running.values()) > 0)
        pool = client.engine.stats().pools["decode0"]
        assert pool.total == pool.free + pool.used + pool.cached == 27
        assert pool.used >= 3
    for reply in replies:
        reply.wait()
    pools = client.engine.stats().pools
    assert set(pools) == {"prefill0", "decode0"}
    assert [pool.used for pool in pools.values()] == [0, 0]
    assert all(pool.cached > 0 for pool in pools.values())
