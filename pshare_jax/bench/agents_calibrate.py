"""Prefill and decode time of a session, apart: what G_max needs to know of a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from pshare_jax.bench.agents_client import CompletionClient
from pshare_jax.bench.agents_load import Load, Player
from pshare_jax.bench.agents_metrics import ServerMetrics, watched
from pshare_jax.bench.agents_stats import prompt_origins
from pshare_jax.bench.agents_targets import Target
from pshare_jax.bench.agents_workload import Workload
from pshare_jax.errors import BenchmarkError

_LEAST_CACHED = 0.95


@dataclass(frozen=True)
class Costs:
    """Seconds that the engines' threads work for one session: A and D of `limits.g_max`."""

    prefill: float
    decode: float


async def session_costs(
    http: aiohttp.ClientSession,
    target: Target,
    workload: Workload,
    encode: Callable[[str], list[int]],
    load: Load,
    extra_body: Mapping[str, Any],
) -> Costs:
    """Measures one server that shares, in two passes over the same sessions.

    In a mixed run on one processor each side's time contains waiting for the other. So: first one
    token a call and one session at a time, where almost all work is prefill; then all tokens at
    the load's concurrency, where every prompt is cached and almost all work is decode. Contexts
    grow by scripted text, so that both passes have the same prompts.

    Raises:
        BenchmarkError: a call failed, the server shows no busy seconds, or prompts fell out of its
            cache between the passes.
    """
    client = CompletionClient(http, extra_body, want_ids=False)
    alone = Load(load.sessions, 1, 0.0, load.seed)
    together = Load(load.sessions, load.concurrency, 0.0, load.seed)
    short = Player(client, target.endpoints, workload, encode, "scripted", reply_tokens=1)
    async with watched(http, target.urls) as prefill:
        await short.play(alone)
    full = Player(client, target.endpoints, workload, encode, "scripted")
    async with watched(http, target.urls) as decode:
        sessions = await full.play(together, warm_cache=True)
    origins = prompt_origins([call for session in sessions for call in session.calls])
    cached, total = origins["cached"] or 0, origins["total"] or 0
    if cached < _LEAST_CACHED * total:
        raise BenchmarkError(
            f"{target.name}: only {cached} of {total} prompt tokens were still cached, so decode "
            f"cannot be measured apart: raise the pools' num_pages or lower --concurrency"
        )
    return Costs(
        _busy(target, prefill, "prefill") / load.sessions,
        _busy(target, decode, "decode") / load.sessions,
    )


def _busy(target: Target, metrics: ServerMetrics, side: str) -> float:
    seconds = metrics.grown("busy_seconds", side)
    if seconds is None:
        raise BenchmarkError(f"{target.name}: /metrics shows no pshare_busy_seconds of {side}")
    return seconds
