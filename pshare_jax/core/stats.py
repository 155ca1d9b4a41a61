"""Counters of the cores, and one immutable snapshot of a running engine."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pshare_jax.core.requests import FinishReason, PromptUsage

TokenSource = Literal["computed", "same_model", "other_model"]
PageRead = Literal["read", "saved"]
UnaskedOutcome = Literal["made", "crowded", "used"]


class PrefillStats:
    """What a prefill core has done, by model: prompt tokens by who computed their KV.

    `ahead_tokens` are those of replies that were covered before anybody asked, `foreseen_tokens`
    prompt tokens that were found for that reason, each once. `borrowed_tokens` are those whose
    pages came from other workers, `failed_loans` transfers for that which failed. `unasked`, by
    decode worker, are offers that nobody had asked for, see `EngineStats`.
    """

    def __init__(self) -> None:
        self.prefill_tokens: Counter[tuple[str, TokenSource]] = Counter()
        self.ahead_tokens: Counter[str] = Counter()
        self.foreseen_tokens: Counter[str] = Counter()
        self.borrowed_tokens = 0
        self.failed_loans = 0
        self.unasked: Counter[tuple[str, UnaskedOutcome]] = Counter()

    def prefilled(self, model: str, usage: PromptUsage, foreseen: int = 0) -> None:
        """A prompt's KV is complete in the pool; `foreseen` of its tokens were computed ahead."""
        self.foreseen_tokens[model] += foreseen
        own = usage.cached_tokens - usage.shared_tokens
        self.prefill_tokens[model, "computed"] += usage.computed_tokens
        self.prefill_tokens[model, "same_model"] += own
        self.prefill_tokens[model, "other_model"] += usage.shared_tokens


class StoreStats:
    """What a prefill core has asked of the KV store: prompts looked for, tokens fetched, pages not
    fetched since computing them was cheaper or there was no room, what came too late, and seconds
    that prompts have waited for it.

    Of the pages that were fetched before anybody asked, in bytes of the pool: all of them, those
    that a prompt then used, and those that were evicted before."""

    def __init__(self) -> None:
        self.looks = 0
        self.fetched_tokens = 0
        self.declined = 0
        self.late = 0
        self.stall_seconds = 0.0
        self.early_bytes = 0
        self.early_used_bytes = 0
        self.early_wasted_bytes = 0


class DecodeStats:
    """What a decode core has done, by model; `forced_tokens` are those of the generated ones that
    were not sampled, `pages` KV pages read and not read again, `failed_transfers` those whose pages
    did not come or were not what was asked for, `moved_rows` sequences that left with their KV
    since the mesh was given to prefill, `moved_pages` pages of such that came, `used_offers`
    sequences whose pages had been put on offer before they were asked for, and were enough."""

    def __init__(self) -> None:
        self.generation_tokens: Counter[str] = Counter()
        self.forced_tokens: Counter[str] = Counter()
        self.handoff_bytes: Counter[str] = Counter()
        self.handoff_pages: Counter[str] = Counter()
        self.preemptions: Counter[str] = Counter()
        self.pages: Counter[PageRead] = Counter()
        self.failed_transfers = 0
        self.moved_rows = 0
        self.moved_pages = 0
        self.used_offers = 0

    def handed_over(self, model: str, pages: int, num_bytes: int) -> None:
        """Pages were moved to the pool."""
        self.handoff_pages[model] += pages
        self.handoff_bytes[model] += num_bytes

    def attended(self, plain_pages: int, saved_pages: int) -> None:
        """A step that shares runs: pages to be read row by row, and saved."""
        self.pages["read"] += plain_pages - saved_pages
        self.pages["saved"] += saved_pages


class DispatcherStats:
    """What has become of requests, by model."""

    def __init__(self) -> None:
        self.prompt_tokens: Counter[str] = Counter()
        self.finished: Counter[tuple[str, FinishReason]] = Counter()

    def ended(self, model: str, reason: FinishReason, prompt_tokens: int) -> None:
        """A request is finished."""
        self.finished[model, reason] += 1
        self.prompt_tokens[model] += prompt_tokens


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
class TierStats:
    """One tier of the KV store, as this process has used it: `hits`, `stored`, and by reason
    `missed` and `refused`, in pages; bytes as they lie there, and those of the stored pages as they
    are in a pool; seconds at work. `slots` are all processes' by state, `buried` dead members that
    were cleaned up after, `rebuilt` how often its books were built anew. `pool` names the file
    among those of all hosts."""

    slots: Mapping[str, int]
    hits: int
    stored: int
    missed: Mapping[str, int]
    refused: Mapping[str, int]
    bytes_read: int
    bytes_written: int
    raw_bytes_written: int
    read_seconds: float
    write_seconds: float
    buried: int
    rebuilt: int
    pool: str = ""

    def of_the_dead(self) -> TierStats:
        """What of a process that has ended still counts; the rest is told by those that live."""
        return dataclasses.replace(self, slots={}, buried=0, rebuilt=0, pool="")


@dataclass(frozen=True)
class EngineStats:
    """What the engine has done since its start, and what it is doing now.

    Counters only grow and are keyed by model name: `prefill_tokens` by (model, source), where the
    source says who computed a prompt token's KV; `forced_tokens` are those of `generation_tokens`
    for which a grammar left no choice, and which no step was taken for; `finished` by (model,
    reason); `compiles` counts compilations after warm-up. `running` and `waiting` are sequences
    right now. `pools`, `busy_seconds` (time at work) and `failed_transfers` are keyed by the
    worker's name: `prefill0`, `decode0`, ... `decode_pages`, by worker and "read" or "saved", are
    the KV pages that decode dispatches read, counted once a dispatch, and those that they did not
    read again since rows share them; they are counted where `decode.shared_prefix` is in force.
    `ahead_tokens` and `foreseen_tokens` are those of `PrefillStats`. `store` is, by worker, what
    was asked of the KV store, and `tiers` are its tiers by name. `transfers` that have arrived from
    other processes are by worker and by the way that they took; their `transfer_bytes` by worker,
    way, codec, and "raw", as they are in a pool, or "wire", as they came; `miscoded` are those that
    came coded and were not what they should be, by worker and reason. `borrowed_tokens`, by prefill
    worker, are prompt tokens whose KV came from another worker that had it. `unasked` are offers of
    pages that nobody had asked for, by the decode worker that they were for: "made", of these
    "used" by it, and "crowded", which were not made since too many stood. Where meshes may do
    either, `moved_rows` are, by decode worker, sequences that left it with their KV, and `working`
    says of every worker whether its mesh is its own at present; elsewhere both are empty.
    """

    prefill_tokens: Mapping[tuple[str, TokenSource], int] = field(
        default_factory=dict[tuple[str, TokenSource], int]
    )
    ahead_tokens: Mapping[str, int] = field(default_factory=dict[str, int])
    foreseen_tokens: Mapping[str, int] = field(default_factory=dict[str, int])
    prompt_tokens: Mapping[str, int] = field(default_factory=dict[str, int])
    generation_tokens: Mapping[str, int] = field(default_factory=dict[str, int])
    forced_tokens: Mapping[str, int] = field(default_factory=dict[str, int])
    handoff_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    handoff_pages: Mapping[str, int] = field(default_factory=dict[str, int])
    failed_transfers: Mapping[str, int] = field(default_factory=dict[str, int])
    preemptions: Mapping[str, int] = field(default_factory=dict[str, int])
    decode_pages: Mapping[tuple[str, PageRead], int] = field(
        default_factory=dict[tuple[str, PageRead], int]
    )
    compiles: int = 0
    finished: Mapping[tuple[str, FinishReason], int] = field(
        default_factory=dict[tuple[str, FinishReason], int]
    )
    running: Mapping[str, int] = field(default_factory=dict[str, int])
    waiting: Mapping[str, int] = field(default_factory=dict[str, int])
    pools: Mapping[str, PoolStats] = field(default_factory=dict[str, PoolStats])
    busy_seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    store: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    tiers: Mapping[str, TierStats] = field(default_factory=dict[str, TierStats])
    transfers: Mapping[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    transfer_bytes: Mapping[tuple[str, str, str, str], int] = field(
        default_factory=dict[tuple[str, str, str, str], int]
    )
    miscoded: Mapping[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    borrowed_tokens: Mapping[str, int] = field(default_factory=dict[str, int])
    unasked: Mapping[tuple[str, UnaskedOutcome], int] = field(
        default_factory=dict[tuple[str, UnaskedOutcome], int]
    )
    moved_rows: Mapping[str, int] = field(default_factory=dict[str, int])
    working: Mapping[str, bool] = field(default_factory=dict[str, bool])


def together(parts: Iterable[EngineStats]) -> EngineStats:
    """Snapshots of several processes as one: numbers are added up, what is by worker is joined."""
    parts = list(parts)
    fields: dict[str, Any] = {}
    for one in dataclasses.fields(EngineStats):
        values = [getattr(part, one.name) for part in parts]
        if one.name == "compiles":
            fields[one.name] = sum(values)
        elif one.name in ("pools", "working"):
            fields[one.name] = {key: of for value in values for key, of in value.items()}
        elif one.name == "store":
            fields[one.name] = _added_by_key(values)
        elif one.name == "tiers":
            names = dict.fromkeys(name for value in values for name in value)
            fields[one.name] = {n: _one_tier([v[n] for v in values if n in v]) for n in names}
        else:
            fields[one.name] = _added(values)
    return EngineStats(**fields)


def _added(counters: Iterable[Mapping[Any, Any]]) -> dict[Any, Any]:
    added: Counter[Any] = Counter()
    for counter in counters:
        added.update(counter)
    return dict(added)


def _added_by_key(values: Iterable[Mapping[str, Mapping[Any, Any]]]) -> dict[str, dict[Any, Any]]:
    """Counters by name; who had a name before counts with who has it now."""
    by_name: dict[str, list[Mapping[Any, Any]]] = {}
    for value in values:
        for name, counter in value.items():
            by_name.setdefault(name, []).append(counter)
    return {name: _added(counters) for name, counters in by_name.items()}


def _one_tier(tiers: list[TierStats]) -> TierStats:
    """A tier as all processes use it. Those of one host say the same of the pool that they share,
    which is counted once."""
    pools = {tier.pool: tier for tier in tiers}.values()
    fields: dict[str, Any] = {"pool": ""}
    for one in dataclasses.fields(TierStats):
        if one.name in ("slots", "buried", "rebuilt"):
            values = [getattr(tier, one.name) for tier in pools]
        else:
            values = [getattr(tier, one.name) for tier in tiers]
        if one.name in ("slots", "missed", "refused"):
            fields[one.name] = _added(values)
        elif one.name != "pool":
            fields[one.name] = sum(values)
    return TierStats(**fields)
