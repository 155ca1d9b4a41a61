"""Rule 6: whatever becomes of requests, every page ends up free or held by an index."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from pshare_jax.core.requests import FinishReason, RequestOutput
from pshare_jax.errors import EngineDeadError
from tests.engine.harness import (
    Client,
    Models,
    Reply,
    held,
    passed_on,
    running,
    serve_config,
    wait_until,
)
from tests.helpers import tiny_config

NUM_REQUESTS = 70


def count_evictions(client: Client, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    evictions: Counter[str] = Counter()
    for name, cache in client.engine.caches.items():

        def evict(*, pinned: bool = True, name: str = name, original: Any = cache._evict) -> bool:
            evicted = original(pinned=pinned)
            evictions[name] += evicted
            return evicted

        monkeypatch.setattr(cache, "_evict", evict)
    return evictions


def random_prompt(rng: np.random.Generator, contexts: list[list[int]]) -> list[int]:
    """A beginning of one of a few contexts, sometimes with an end of its own."""
    context = contexts[rng.integers(len(contexts))]
    prompt = context[: rng.integers(1, len(context))]
    return [*prompt, *rng.integers(0, 256, rng.integers(0, 9)).tolist()]


@pytest.mark.parametrize("engines", ["client", "client2x2"])
def test_rule_6_no_leaks(
    engines: str,
    models: Models,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A storm of requests, aborted at all stages, over pools that are far too small for it."""
    client: Client = request.getfixturevalue(engines)
    rng = np.random.default_rng(len(engines))
    contexts = rng.integers(0, 256, (4, 60)).tolist()
    evictions = count_evictions(client, monkeypatch)
    preemptions = sum(client.engine.stats().preemptions.values())
    names = list(models.full_weights)
    asked: list[tuple[str, list[int], int, Reply]] = []
    for i in range(NUM_REQUESTS):
        name = names[rng.integers(len(names))]
        prompt, max_tokens = random_prompt(rng, contexts), int(rng.integers(1, 60))
        asked.append((name, prompt, max_tokens, client.submit(name, prompt, max_tokens)))
        match rng.integers(5):
            case 0:  # where it is just now: waiting, in prefill, or waiting for room
                client.abort(asked[rng.integers(len(asked))][3])
            case 1:  # while it decodes, if it has come that far
                reply = asked[rng.integers(len(asked))][3]
                if reply.reason is None and i % 2:
                    reply.next_event()
                client.abort(reply)
            case _:
                pass
    for _, _, _, reply in asked:
        reply.wait(120)
    client.check_idle()
    reasons = Counter(reply.reason for *_, reply in asked)
    assert reasons[FinishReason.ABORT] >= 5
    assert reasons[FinishReason.LENGTH] >= 20
    assert sum(client.engine.stats().preemptions.values()) > preemptions
    assert {name.rstrip("01") for name in evictions} == {"prefill", "decode"}
    for name, prompt, max_tokens, reply in asked:
        expected = models.expected(name, prompt, max_tokens)
        if reply.reason is FinishReason.LENGTH:
            assert reply.tokens == expected
        else:
            assert reply.tokens == expected[: len(reply.tokens)]


def test_preempted_sequences_replay_and_go_on(client: Client, models: Models) -> None:
    """Long answers of all kinds of models at once: all but the oldest are preempted."""
    before = client.engine.stats().preemptions
    rng = np.random.default_rng(5)
    asked = [(name, rng.integers(0, 256, 11 + i).tolist()) for i, name in enumerate(models.tails)]
    replies = [client.submit(name, prompt, 100) for name, prompt in asked]
    for (name, prompt), reply in zip(asked, replies, strict=True):
        reply.wait()
        assert reply.tokens == models.expected(name, prompt, 100)
    after = client.engine.stats().preemptions
    preempted = {name for name in after if after[name] > before.get(name, 0)}
    assert len(preempted) >= 3
    assert asked[0][0] not in preempted
    client.check_idle()


def test_aborts_at_every_stage(client: Client) -> None:
    """Nobody else is running, so each stage is met for certain."""
    prompt = list(range(60))
    with held(client, after=1):
        reply = client.submit("full", prompt, 60)
        reply.next_event()
        client.abort(reply)
        client.abort(reply)
        client.engine.abort("no such request")
        passed_on(client)
    assert reply.wait().reason is FinishReason.ABORT
    assert 0 < len(reply.tokens) < 60

    # One sequence fills the decode pool, so that the next one is covered and waits for room.
    with held(client, after=1):
        wide = client.submit("full", prompt, 60)
        wide.next_event()
        blocked = [client.submit("lora", [i, *prompt], 60) for i in range(6)]
        for other in blocked:
            client.abort(other)
        passed_on(client)
    assert {other.wait().reason for other in blocked} == {FinishReason.ABORT}
    assert wide.wait().reason is FinishReason.LENGTH
    client.check_idle()


def test_abort_from_the_sink(client: Client) -> None:
    """A front that finds a stop string aborts from within the event."""
    reply = client.submit(
        "full", [1, 2, 3], 100, id="own", then=lambda event: client.engine.abort("own")
    )
    assert reply.wait().reason is FinishReason.ABORT
    assert len(reply.tokens) < 100
    client.check_idle()


def test_the_books_are_closed_before_the_last_event(client: Client) -> None:
    """Who has seen the last event may use the id again, and finds all pages back."""
    again: list[Reply] = []
    idle: list[bool] = []

    def then(event: RequestOutput) -> None:
        if event.finish_reason is not None and not again:
            client.check_idle()
            idle.append(True)
            again.append(client.submit("full", [1, 2, 3], id="same"))

    client.submit("full", [1, 2, 3], id="same", then=then).wait()
    wait_until(lambda: again)
    assert again[0].wait().reason is FinishReason.LENGTH
    assert idle == [True]


def test_a_sink_that_fails_ends_its_own_request_only(client: Client) -> None:
    def broken(event: RequestOutput) -> None:
        raise RuntimeError("the client has gone")

    other = client.submit("full", [1, 2], 60)
    reply = client.submit("full", [1, 2, 3], 100, then=broken)
    assert reply.wait().reason is FinishReason.ABORT
    assert other.wait().reason is FinishReason.LENGTH
    client.check_idle()


@pytest.fixture(scope="module")
def two_models() -> Models:
    models = Models(tiny_config())
    models.add_full("full", 1)
    models.add_full("tail3", 2, tail=3)
    return models


@pytest.mark.parametrize(
    ("side", "program", "survivors"),
    [
        ("prefill", "chunk", 3),
        ("prefill", "gather", 3),
        ("decode", "scatter", 0),
        ("decode", "replay", 0),
        ("decode", "decode", 0),
    ],
)
def test_a_failing_step_fails_what_its_worker_has(
    two_models: Models, side: str, program: str, survivors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs in decode is not touched by a prefill worker's end; nothing new is taken on."""

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    with running(two_models, serve_config()) as client:
        engine = client.engine
        with held(client, rows=3):
            replies = [client.submit("full", [i] * 20, 40) for i in range(3)]
            wait_until(lambda: engine.stats().running["full"] == 3)
            [worker] = getattr(engine.workers, side)
            monkeypatch.setattr(worker.executor.programs, program, fail)
            replies.append(client.submit("tail3", [7] * 30, 90))
        for reply in replies:
            reply.wait()
        assert [reply.reason for reply in replies[:survivors]] == [FinishReason.LENGTH] * survivors
        for reply in replies[survivors:]:
            assert reply.reason is FinishReason.ERROR
            assert reply.error is not None
            assert "out of memory" in reply.error
        assert engine.failed_workers == {f"{side}0": "RuntimeError: out of memory"}
        assert engine.dead is not None
        assert f"{side}0" in engine.dead
        with pytest.raises(EngineDeadError, match="out of memory"):
            client.submit("full", [1])
        assert engine.stats().finished.get(("full", FinishReason.LENGTH), 0) == survivors


def test_stop_ends_what_runs(two_models: Models) -> None:
    with running(two_models, serve_config()) as client:
        replies = [client.submit("full", [i] * 20, 100) for i in range(20)]
        replies[0].next_event()
        client.engine.stop()
        reasons = Counter(reply.wait().reason for reply in replies)
        assert set(reasons) <= {FinishReason.ERROR, FinishReason.LENGTH}
        assert reasons[FinishReason.ERROR] >= 10
        assert all("stopped" in (r.error or "stopped") for r in replies)
        with pytest.raises(EngineDeadError, match="not running"):
            client.submit("full", [1])
        client.check_idle()
