"""`bench tiers`: what fetching ahead gives, in virtual time with the engine's own cores.

Sessions of several agents, each with a context of its own that grows from call to call; together
they are several times what the pools hold. An agent is called after another one, mostly in turn.
What a pool has evicted is computed again, or fetched from a tier below: when it is asked for, layer
by layer while what was appended is computed, or before it is asked for. Costs of steps are measured
ones of `bench micro`; those of a tier are options.

Sessions wait for each other, and a call that comes a little later meets others, so one run says
little: each policy is run with several draws of who is called when, the same ones for all, and its
difference to fetching on demand has a standard error. Pauses are random, or sessions would fall
into step with each other, each policy into another one.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from pshare_jax.bench.plan.calibrate import read_results, table_costs
from pshare_jax.bench.plan.costs import CostModel
from pshare_jax.bench.plan.specs import EngineSpec, ServerSpec, SystemSpec
from pshare_jax.bench.plan.store import StoreSpec
from pshare_jax.bench.plan.system import SimCall, System
from pshare_jax.config import DecodeConfig
from pshare_jax.core.requests import Session

POLICIES = (
    "LRU only",
    "on demand",
    "next layer",
    "next agent, learned",
    "next agent, told",
    "all-knowing",
)
"""What is done about pages that a pool has evicted. `LRU only` has no tier. `next layer` hides all
but a layer's part of a load behind computing what was appended. `all-knowing` begins each load so
early that it is waited for only if the tier is behind."""

ON_DEMAND = "on demand"

PAGE_SIZE = 64


@dataclass(frozen=True)
class TiersOptions:
    """What is simulated.

    Args:
        micro: results of `bench micro`: what steps cost.
        sessions: live at once.
        agents: of a session, each with its own context.
        rounds: calls of each agent.
        prompt: tokens that an agent's context begins with.
        appended: tokens between an agent's calls, its reply included.
        generated: tokens of a reply.
        pause: seconds between two calls of a session, in the mean; each is half to one and a half
            times as long.
        surprise: share of calls that are of another agent than the next in turn.
        pool_share: of the working set, that each pool holds.
        sets: working set over what the tier holds.
        tiers: seconds to read a page, by name of a tier.
        call: seconds to begin a load.
        copy: seconds to copy a page between the pool and the host's memory.
        page_bytes: of a page in the pool.
        layers: of the model.
        budget_share: of a pool, that may hold pages which were fetched ahead and not used.
        seed: of who is called when.
        draws: of that.
    """

    micro: list[str] = field(default_factory=lambda: ["docs/results/micro-cpu_ffi.json"])
    sessions: int = 12
    agents: int = 4
    rounds: int = 5
    prompt: int = 704
    appended: int = 96
    generated: int = 24
    pause: float = 4.0
    surprise: float = 0.15
    pool_share: float = 0.25
    sets: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0, 4.0])
    tiers: dict[str, float] = field(
        default_factory=lambda: {
            "shared memory": 0.0004,
            "disk": 0.0011,
            "disk at 100 MB/s": 0.0103,
        }
    )
    call: float = 0.0002
    copy: float = 0.0002
    page_bytes: int = 1_474_560
    layers: int = 30
    budget_share: float = 0.25
    seed: int = 0
    draws: int = 6

    @property
    def working_set(self) -> int:
        """Pages of all contexts together, as they are in the middle of the run."""
        middle = self.prompt + self.appended * self.rounds // 2
        return self.sessions * self.agents * -(-middle // PAGE_SIZE)


def run(options: TiersOptions) -> dict[str, Any]:
    """Simulates every policy over every tier.

    Returns:
        `{"options", "working_set": pages, "rows": [{"tier", "set", "policy", figures}]}`, where the
        figures are of calls that find a context of theirs, means of all draws: `ttft_median`,
        `ttft_p95`, `stall` of a call (all in seconds), `hits` (share of prompt tokens that were not
        computed), `calls_per_second`, and bytes that were read from the tier and read in vain.
        `gain` is the mean by which `ttft_median` is less than on demand, in seconds, and
        `gain_error` the standard error of that.

    Raises:
        ConfigError: results of `bench micro` that cannot be read.
    """
    costs = table_costs(read_results(options.micro))
    rows: list[dict[str, Any]] = []
    alone = _draws(options, costs, "LRU only", None)
    for tier, page in options.tiers.items():
        for ratio in options.sets:
            found = dict.fromkeys(POLICIES, alone)
            for policy in POLICIES:
                spec = _store(options, costs, policy, page, ratio)
                if spec is not None:
                    found[policy] = _draws(options, costs, policy, spec)
            for policy, draws in found.items():
                figures = _mean(draws) | _gain(draws, found[ON_DEMAND])
                rows.append({"tier": tier, "set": ratio, "policy": policy, **figures})
    return {"options": asdict(options), "working_set": options.working_set, "rows": rows}


def _draws(
    options: TiersOptions, costs: CostModel, policy: str, store: StoreSpec | None
) -> list[dict[str, Any]]:
    """Figures of each draw."""
    seeds = range(options.seed, options.seed + options.draws)
    return [_simulate(replace(options, seed=seed), costs, policy, store) for seed in seeds]


def _mean(draws: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: float(np.mean([one[name] for one in draws])) for name in draws[0]}


def _gain(draws: list[dict[str, Any]], on_demand: list[dict[str, Any]]) -> dict[str, float]:
    """By how much first tokens come earlier than on demand, each draw against the same one."""
    gains = [
        other["ttft_median"] - one["ttft_median"]
        for one, other in zip(draws, on_demand, strict=True)
    ]
    error = float(np.std(gains, ddof=1)) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    return {"gain": float(np.mean(gains)), "gain_error": error}


def _store(
    options: TiersOptions, costs: CostModel, policy: str, page: float, ratio: float
) -> StoreSpec | None:
    if policy == "LRU only":
        return None
    spec = StoreSpec(int(options.working_set / ratio), options.call, page, options.copy)
    if policy == "next layer":
        beside = costs.chunk(128, options.appended, options.prompt)
        return replace(spec, hidden=beside, layers=options.layers)
    if policy == "all-knowing":
        return replace(spec, hidden=float("inf"), layers=2**30)
    if policy.startswith("next agent"):
        budget = options.budget_share * options.pool_share * options.working_set
        return replace(spec, prefetch_pages=int(budget))
    return spec


def system_spec(options: TiersOptions, costs: CostModel, store: StoreSpec | None) -> SystemSpec:
    """One server of one processor, with pools that hold a part of the working set."""
    pages = int(options.pool_share * options.working_set)
    server = ServerSpec(
        models=range(options.agents),
        shared=True,
        one_group=True,
        page_size=PAGE_SIZE,
        chunk_buckets=[128, 512],
        settings=DecodeConfig(max_num_seqs=32, batch_buckets=[1, 4, 16, 32]),
        prefill=[EngineSpec(costs, pages, 0)],
        decode=[EngineSpec(costs, pages, 0)],
        store=store,
    )
    return SystemSpec([server])


def _simulate(
    options: TiersOptions, costs: CostModel, policy: str, store: StoreSpec | None
) -> dict[str, Any]:
    system = System(system_spec(options, costs, store))
    sessions = [
        _Session(system, options, number, told=policy.endswith("told"))
        for number in range(options.sessions)
    ]
    for number, session in enumerate(sessions):
        system.clock.at(options.pause * number / options.sessions, session.call)
    system.clock.run()
    calls = [call for session in sessions for call in session.later]
    first = [call.arrivals[0] - asked for call, asked in calls]
    stats = [w.core.store.stats for w in system.prefill if w.core.store is not None]
    read = sum(store.read_pages for store in system.stores)
    useful = sum(s.early_used_bytes for s in stats)
    early = sum(s.early_pages for s in system.stores)
    return {
        "calls": len(calls),
        "ttft_median": float(np.median(first)),
        "ttft_p95": float(np.percentile(first, 95)),
        "stall": sum(s.stall_seconds for s in stats) / len(calls),
        "hits": sum(call.cached for call, _ in calls) / sum(call.prompt for call, _ in calls),
        "calls_per_second": len(calls) / system.clock.now,
        "read_bytes": read * options.page_bytes,
        "early_bytes": early * options.page_bytes,
        "wasted_bytes": (early - useful) * options.page_bytes,
    }


class _Session:
    """Calls its agents one after the other; `later` are calls of agents that were called before."""

    def __init__(self, system: System, options: TiersOptions, number: int, *, told: bool):
        self._system = system
        self._options = options
        self._number = number
        self._told = told
        self._lengths = [options.prompt] * options.agents
        self._left = self._order()
        self._rng = random.Random(f"{options.seed} {number} pauses")
        self.later: list[tuple[SimCall, float]] = []

    def _order(self) -> list[int]:
        """Who is called, one after the other: in turn, but for some surprises."""
        options = self._options
        rng = random.Random(f"{options.seed} {self._number}")
        order = []
        for i in range(options.rounds * options.agents):
            surprised = rng.random() < options.surprise
            order.append(rng.randrange(options.agents) if surprised else i % options.agents)
        return order

    def call(self) -> None:
        """The next call, if there is one."""
        if not self._left:
            return
        options, agent = self._options, self._left.pop(0)
        hints = [str(self._left[0])] if self._told and self._left else []
        asked, length = self._system.clock.now, self._lengths[agent]
        again = length > options.prompt
        call = self._system.submit(
            self._number * options.agents + agent,
            agent,
            length,
            options.generated,
            partial(self._ended),
            hints=Session(f"s{self._number}", next_models=tuple(hints)),
        )
        if again:
            self.later.append((call, asked))
        self._lengths[agent] += options.appended

    def _ended(self) -> None:
        clock = self._system.clock
        pause = self._options.pause * self._rng.uniform(0.5, 1.5)
        clock.at(clock.now + pause, self.call)


def lines(result: dict[str, Any]) -> list[str]:
    """Markdown tables of a result, one a tier."""
    shown = [
        f"Working set {result['working_set']} pages, pools "
        f"{result['options']['pool_share']:.0%} of it; virtual time; means of "
        f"{result['options']['draws']} draws.",
    ]
    head = (
        "| set / tier | policy | TTFT, ms (p95) | earlier than on demand, ms | stall a call, ms "
        "| hit rate | calls/s | read, MB | in vain, MB |"
    )
    for tier in dict.fromkeys(row["tier"] for row in result["rows"]):
        shown += ["", f"**{tier}**", "", head, "|--:|---|--:|--:|--:|--:|--:|--:|--:|"]
        for row in result["rows"]:
            if row["tier"] == tier:
                gain = f"{1e3 * row['gain']:.0f} +- {1e3 * row['gain_error']:.0f}"
                shown.append(
                    f"| {row['set']:g} | {row['policy']} | {1e3 * row['ttft_median']:.0f} "
                    f"({1e3 * row['ttft_p95']:.0f}) | {gain} | {1e3 * row['stall']:.1f} "
                    f"| {row['hits']:.0%} | {row['calls_per_second']:.2f} "
                    f"| {row['read_bytes'] / 1e6:.0f} | {row['wasted_bytes'] / 1e6:.0f} |"
                )
    return shown
