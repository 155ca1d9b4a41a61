"""What a run's calls and sessions amount to: rates, percentiles, where prompts came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pshare_jax.bench.agents_load import CallRecord, SessionRecord

PERCENTILES = (50, 95, 99)


def summary(sessions: Sequence[SessionRecord]) -> dict[str, Any]:
    """Figures of one run; times in seconds.

    Throughput is taken from the first arrival to the last reply. `ttft_s`: from when a call could
    be sent to its first token; `next_ttft_s` is that of the calls after a session's first.
    `inter_token_s`: between chunks that brought tokens; a server that sends several at a time has
    fewer and longer ones.

    Args:
        sessions: at least one, each with at least one call.
    """
    calls = [call for session in sessions for call in session.calls]
    seconds = max(s.end for s in sessions) - min(s.arrival for s in sessions)
    generated = sum(call.generated for call in calls)
    return {
        "seconds": seconds,
        "sessions": len(sessions),
        "calls": len(calls),
        "generated_tokens": generated,
        "generated_tokens_per_s": generated / seconds,
        "calls_per_s": len(calls) / seconds,
        "sessions_per_s": len(sessions) / seconds,
        "ttft_s": percentiles(call.arrivals[0] - call.asked for call in calls),
        "next_ttft_s": percentiles(
            call.arrivals[0] - call.asked
            for session in sessions
            for call in session.calls
            if call.asked > session.arrival
        ),
        "inter_token_s": percentiles(
            later - earlier
            for call in calls
            for earlier, later in zip(call.arrivals, call.arrivals[1:], strict=False)
        ),
        "call_s": percentiles(call.end - call.asked for call in calls),
        "session_s": percentiles(session.end - session.arrival for session in sessions),
        "prompt_tokens": prompt_origins(calls),
    }


def percentiles(values: Iterable[float]) -> dict[str, float] | None:
    """`{"p50", "p95", "p99"}`, linear between samples; None of nothing."""
    samples = list(values)
    if not samples:
        return None
    return {
        f"p{p}": float(q)
        for p, q in zip(PERCENTILES, np.percentile(samples, PERCENTILES), strict=True)
    }


def prompt_origins(calls: Sequence[CallRecord]) -> dict[str, int | None]:
    """Prompt tokens by origin, as the replies' usage tells; None where it does not.

    `computed` includes what a decode module is always fed; `same_model` and `other_model` are
    cached tokens by who computed them, told apart only by servers that say `shared_tokens`.
    """
    total = sum(call.prompt for call in calls)
    cached = _sum(call.cached for call in calls)
    shared = _sum(call.shared for call in calls)
    return {
        "total": total,
        "computed": None if cached is None else total - cached,
        "cached": cached,
        "same_model": None if cached is None or shared is None else cached - shared,
        "other_model": shared,
    }


def _sum(values: Iterable[int | None]) -> int | None:
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)
