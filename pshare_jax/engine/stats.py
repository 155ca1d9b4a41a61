"""Counters and gauges of a running engine, as one immutable snapshot. No jax here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pshare_jax.engine.request import FinishReason

TokenSource = Literal["computed", "same_model", "other_model"]
PageRead = Literal["read", "saved"]


@dataclass(frozen=True)
class PoolStats:
    """Pages of one pool: `total = free + used + cached`, page 0 (padding) not counted.

    `used` pages are referenced by a running sequence, `shared` of them by two or more; `cached`
    pages are held by a prefix index alone and can be evicted.
    """

    total: int
    free: int
    used: int
    shared: int
    cached: int


@dataclass(frozen=True)
class EngineStats:
    """What the engine has done since its start, and what it is doing now.

    Counters only grow and are keyed by model name: `prefill_tokens` by (model, source), where the
    source says who computed a prompt token's KV; `finished` by (model, reason); `compiles` counts
    compilations after warm-up. `running` and `waiting` are sequences right now. `pools` and
    `busy_seconds` (time at work) are keyed by the engine's name: `prefill0`, `decode0`, ...
    `decode_pages`, by engine and "read" or "saved", are the KV pages that decode dispatches read,
    counted once a dispatch, and those that they did not read again since rows share them; they
    are counted where `decode.shared_prefix` is in force.
    """

    prefill_tokens: Mapping[tuple[str, TokenSource], int] = field(default_factory=dict)
    prompt_tokens: Mapping[str, int] = field(default_factory=dict)
    generation_tokens: Mapping[str, int] = field(default_factory=dict)
    handoff_bytes: Mapping[str, int] = field(default_factory=dict)
    handoff_pages: Mapping[str, int] = field(default_factory=dict)
    preemptions: Mapping[str, int] = field(default_factory=dict)
    decode_pages: Mapping[tuple[str, PageRead], int] = field(default_factory=dict)
    compiles: int = 0
    finished: Mapping[tuple[str, FinishReason], int] = field(default_factory=dict)
    running: Mapping[str, int] = field(default_factory=dict)
    waiting: Mapping[str, int] = field(default_factory=dict)
    pools: Mapping[str, PoolStats] = field(default_factory=dict)
    busy_seconds: Mapping[str, float] = field(default_factory=dict)
