"""`bench routes`: routing by load alone over a KV store, against routing by prefix.

Prompts come at random times; each begins with one of some long texts, of which few may be much more
popular than others, and goes on with something of its own. Several prefill engines cover them. Who
routes by prefix sends the prompts of a popular text to one engine, until that is far behind; with a
store what one engine has computed is at hand for all. In virtual time, with the engine's own cores;
costs of steps are measured ones of `bench micro`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from pshare_jax.bench.plan.calibrate import read_results, table_costs
from pshare_jax.bench.plan.costs import CostModel
from pshare_jax.bench.plan.specs import EngineSpec, ServerSpec, SystemSpec
from pshare_jax.bench.plan.store import StoreSpec
from pshare_jax.bench.plan.system import SimCall, System
from pshare_jax.config import DecodeConfig, RoutingPolicy

PAGE_SIZE = 64

WAYS: tuple[tuple[str, RoutingPolicy, bool], ...] = (
    ("prefix, no store", "prefix", False),
    ("prefix, store", "prefix", True),
    ("load, store", "load", True),
)
"""What is compared: how prefill engines are chosen, and whether there is a store."""


@dataclass(frozen=True)
class RoutesOptions:
    """What is simulated.

    Args:
        micro: results of `bench micro`: what steps cost.
        engines: numbers of prefill engines, each with a decode engine and a processor for both.
        zipf: exponents of the texts' popularity; 0 is all alike.
        texts: that prompts begin with, for each engine.
        prefix: tokens of a text.
        own: tokens that each prompt has of its own.
        generated: tokens of a reply.
        busy: share of the engines' time that computing what is each prompt's own takes.
        prompts: for each engine.
        pool_texts: texts that the pool of an engine holds.
        call: seconds to begin a load from the store.
        page: seconds to read a page of it.
        copy: seconds to copy a page between the pool and the host's memory.
        page_bytes: of a page.
        seed: of what comes when.
    """

    micro: list[str] = field(default_factory=lambda: ["docs/results/micro-cpu_ffi.json"])
    engines: list[int] = field(default_factory=lambda: [2, 4])
    zipf: list[float] = field(default_factory=lambda: [0.0, 1.0, 1.5])
    texts: int = 8
    prefix: int = 1536
    own: int = 192
    generated: int = 2
    busy: float = 0.6
    prompts: int = 250
    pool_texts: int = 6
    call: float = 0.0002
    page: float = 0.0004
    copy: float = 0.0002
    page_bytes: int = 1_474_560
    seed: int = 0


def run(options: RoutesOptions) -> dict[str, Any]:
    """Simulates all ways over all loads.

    Returns:
        `{"options", "rows": [{"engines", "zipf", "way", figures}]}`: `ttft_median` and `ttft_p95`
        in seconds, `imbalance` (time at work of the busiest engine over the mean), `computed`
        tokens of a prompt, and `read_bytes` from the store.

    Raises:
        ConfigError: results of `bench micro` that cannot be read.
    """
    costs = table_costs(read_results(options.micro))
    rows = [
        {"engines": engines, "zipf": zipf, "way": way}
        | _simulate(options, costs, engines, zipf, policy, stores)
        for engines in options.engines
        for zipf in options.zipf
        for way, policy, stores in WAYS
    ]
    return {"options": asdict(options), "rows": rows}


def _spec(
    options: RoutesOptions, costs: CostModel, engines: int, policy: RoutingPolicy, stores: bool
) -> SystemSpec:
    whole = -(-(options.prefix + options.own) // PAGE_SIZE)
    pages = options.pool_texts * whole + 4 * whole
    sides = [EngineSpec(costs, pages, i) for i in range(engines)]
    store = StoreSpec(2 * options.texts * engines * whole, options.call, options.page, options.copy)
    server = ServerSpec(
        models=[0],
        shared=True,
        one_group=True,
        page_size=PAGE_SIZE,
        chunk_buckets=[128, 512],
        settings=DecodeConfig(max_num_seqs=32, batch_buckets=[1, 4, 16, 32]),
        prefill=sides,
        decode=sides,
        store=store if stores else None,
        routing=policy,
    )
    return SystemSpec([server])


def _simulate(
    options: RoutesOptions,
    costs: CostModel,
    engines: int,
    zipf: float,
    policy: RoutingPolicy,
    stores: bool,
) -> dict[str, Any]:
    system = System(_spec(options, costs, engines, policy, stores))
    rng = np.random.default_rng(options.seed)
    texts, count = options.texts * engines, options.prompts * engines
    popularity = 1 / np.arange(1, texts + 1) ** zipf
    chosen = rng.choice(texts, count, p=popularity / popularity.sum())
    each = costs.chunk(512, options.own, options.prefix) + costs.decode_step(1, 1, options.prefix)
    times = np.cumsum(rng.exponential(each / options.busy / engines, count))
    calls: list[tuple[SimCall, float]] = []

    def ask(number: int, text: int) -> None:
        call = system.submit(
            texts + number,
            0,
            options.own,
            options.generated,
            lambda: None,
            prefix=(text, options.prefix),
        )
        calls.append((call, system.clock.now))

    # Each text once, and in peace: what pools and store are filled with first is not counted.
    for text in range(texts):
        ask(count + text, text)
        system.clock.run()
    before = system.clock.now
    calls.clear()
    read_before = sum(store.read_pages for store in system.stores)
    busy_before = [worker.executor.seconds for worker in (*system.prefill, *system.decode)]
    for number, (text, time) in enumerate(zip(chosen.tolist(), times.tolist(), strict=True)):
        system.clock.at(before + time, partial(ask, number, text))
    system.clock.run()
    first = [call.arrivals[0] - asked for call, asked in calls]
    worked = [
        worker.executor.seconds - earlier
        for worker, earlier in zip((*system.prefill, *system.decode), busy_before, strict=True)
    ]
    busy = [worked[i] + worked[engines + i] for i in range(engines)]
    read = sum(store.read_pages for store in system.stores) - read_before
    return {
        "ttft_median": float(np.median(first)),
        "ttft_p95": float(np.percentile(first, 95)),
        "imbalance": max(busy) / (sum(busy) / len(busy)),
        "computed": sum(call.prompt - call.cached for call, _ in calls) / len(calls),
        "read_bytes": read * options.page_bytes,
    }


def lines(result: dict[str, Any]) -> list[str]:
    """A Markdown table of a result."""
    shown = [
        "| engines | Zipf | routing | TTFT, ms (p95) | busiest / mean | computed a prompt "
        "| read, GB |",
        "|--:|--:|---|--:|--:|--:|--:|",
    ]
    return shown + [
        f"| {row['engines']} | {row['zipf']:g} | {row['way']} | {1e3 * row['ttft_median']:.0f} "
        f"({1e3 * row['ttft_p95']:.0f}) | {row['imbalance']:.2f} | {row['computed']:.0f} "
        f"| {row['read_bytes'] / 1e9:.2f} |"
        for row in result["rows"]
    ]
