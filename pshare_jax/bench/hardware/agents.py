"""Sessions of several models over one growing context, on one prefill module or each on its own."""

from __future__ import annotations

import queue
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from pshare_jax.bench.hardware.kernels import Keep
from pshare_jax.bench.hardware.random_models import (
    engine,
    engine_config,
    full_module,
    random_weights,
)
from pshare_jax.bench.hardware.scale import Scale
from pshare_jax.core.requests import Request, RequestOutput, SamplingParams
from pshare_jax.core.stats import TokenSource
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.errors import EngineDeadError

EVENT_SECONDS = 120
SHARED, ISOLATED = "shared", "isolated"


@dataclass
class _Session:
    """One conversation: its tokens so far, and which call it is at."""

    tokens: list[int]
    calls: int = 0
    reply: list[int] = field(default_factory=list)
    started: float = 0.0


def run(scale: Scale, keep: Keep) -> None:
    """The same sessions with both. Keeps by name (`shared`, `isolated`): `{"seconds", "calls_s",
    "ttft_p50", "ttft_p95", "computed_tokens", "other_model_tokens"}`; `gain`, calls a second with
    sharing to those without; and `most`, the ratio of prompt tokens computed, which bounds it.

    Raises:
        SkippedError: the models do not fit.
    """
    found = {}
    for sharing in (SHARED, ISOLATED):
        found[sharing] = _sessions(scale, sharing)
        keep(sharing, found[sharing])
    keep("gain", found[SHARED]["calls_s"] / found[ISOLATED]["calls_s"])
    keep("most", found[ISOLATED]["computed_tokens"] / found[SHARED]["computed_tokens"])


def _sessions(scale: Scale, sharing: str) -> dict[str, Any]:
    model, dtype = scale.small, jnp.dtype(scale.dtype)
    calls = scale.agents * scale.turns
    room = calls * (scale.appended + scale.reply)
    # Without sharing each model has its own pages of every context. Both get as many, so that what
    # is compiled for one is there for the other.
    contexts = scale.sessions * (1 + scale.agents)
    config = engine_config(scale, scale.sessions, scale.context, room, contexts)
    names = [f"agent{i}" for i in range(scale.agents)]
    sources = [full_module(name, model, i + 1, dtype, sharing) for i, name in enumerate(names)]
    with engine(config, model, sources, random_weights(model, 0, dtype)) as made:
        rng = np.random.default_rng(0)
        _play(made, scale, names[:1], [_Session(_random(rng, model, 8))])  # everything has run once
        before = made.stats().prefill_tokens
        sessions = [
            _Session(_random(rng, model, scale.context - scale.appended))
            for _ in range(scale.sessions)
        ]
        started = time.perf_counter()
        firsts = _play(made, scale, names * scale.turns, sessions)
        took = time.perf_counter() - started
        after = made.stats().prefill_tokens

    def counted(kind: TokenSource) -> int:
        return sum(after.get((name, kind), 0) - before.get((name, kind), 0) for name in names)

    return {
        "seconds": took,
        "calls_s": len(firsts) / took,
        "ttft_p50": statistics.median(firsts),
        "ttft_p95": float(np.percentile(firsts, 95)),
        "computed_tokens": counted("computed"),
        "other_model_tokens": counted("other_model"),
    }


def _play(
    made: Orchestrator, scale: Scale, order: list[str], sessions: list[_Session]
) -> list[float]:
    """Plays all sessions at once, each call after the one before it; gives times to first tokens.

    Raises:
        EngineDeadError: a request failed.
    """
    vocab = made.model_config.vocab_size
    rng = np.random.default_rng(1)
    events: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    running: dict[str, _Session] = {}
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=scale.reply)
    firsts: list[float] = []

    def call(number: int, session: _Session) -> None:
        session.tokens += rng.integers(0, vocab, scale.appended).tolist()
        session.reply, session.started = [], time.perf_counter()
        name = f"{number}-{session.calls}-{len(session.tokens)}"
        running[name] = session
        request = Request(name, order[session.calls], tuple(session.tokens), params)
        made.submit(request, events.put)

    for number, session in enumerate(sessions):
        call(number, session)
    while running:
        event = events.get(timeout=EVENT_SECONDS)
        if event.error is not None:
            raise EngineDeadError(event.error)
        session = running[event.request_id]
        if event.token_ids and not session.reply:
            firsts.append(time.perf_counter() - session.started)
        session.reply += event.token_ids
        if event.finish_reason is not None:
            del running[event.request_id]
            session.tokens += session.reply
            session.calls += 1
            if session.calls < len(order):
                call(int(event.request_id.partition("-")[0]), session)
    return firsts


def _random(rng: np.random.Generator, model: Any, count: int) -> list[int]:
    return rng.integers(0, model.vocab_size, count).tolist()
