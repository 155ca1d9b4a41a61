"""`bench ahead`: first tokens of agents whose contexts do not fit into the pool, in a real engine.

Sessions of agents, each with a context of its own that grows from call to call, are called in turn,
one call at a time, with a pause between calls. The contexts are together some times what the pool
holds. Without a store an agent's context is computed again; with one it is fetched when it is asked
for, or while the agent before it is called. Reading can be made as slow as a slow disk's.
"""

from __future__ import annotations

import queue
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pshare_jax.config import (
    DecodeConfig,
    DType,
    KvStoreConfig,
    ModelEntry,
    PrefillConfig,
    ServeConfig,
)
from pshare_jax.core.requests import Request, RequestOutput, SamplingParams, Session
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.errors import BenchmarkError
from pshare_jax.kv.store.tier import Tier

NONE, DEMAND, LEARNED, TOLD = "no store", "on demand", "next agent, learned", "next agent, told"


@dataclass(frozen=True)
class AheadOptions:
    """What is measured.

    Args:
        base: the prefill checkpoint.
        sessions: whose agents are called in turn.
        agents: of a session.
        rounds: calls of each agent; the first is not counted.
        context: prompt tokens of an agent's first call.
        appended: tokens between its calls.
        generated: tokens of a reply.
        pause: seconds between two calls.
        times: all contexts together, over what the pool holds.
        page_seconds: what reading a page takes in addition, as on a slow disk.
        page_size: token slots of a KV page.
        dtype: as in the server's configuration.
        folder: where the store's file is made, and removed in the end.
        store_bytes: of that file.
        seed: of the random prompts.
    """

    base: str = "checkpoints/smollm2-135m"
    sessions: int = 2
    agents: int = 4
    rounds: int = 3
    context: int = 704
    appended: int = 64
    generated: int = 8
    pause: float = 0.3
    times: float = 4.0
    page_seconds: float = 0.01
    page_size: int = 64
    dtype: DType = "auto"
    folder: str = "/dev/shm"
    store_bytes: int = 2**28
    seed: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its reply."""
        return self.context + self.rounds * self.appended + self.generated + 1

    @property
    def pool_pages(self) -> int:
        """Pages of the pool; at least one sequence fits."""
        whole = -(-self.longest // self.page_size)
        return max(int(self.sessions * self.agents * whole / self.times), whole) + 1


def run(options: AheadOptions) -> dict[str, Any]:
    """Measures all ways.

    Returns:
        `{"options", "rows": [{"way", "ttft_median", "ttft_p95", "computed", "store"}]}`: seconds,
        computed tokens of a call, and what the prefill worker says of the store.

    Raises:
        CheckpointError: the base cannot be loaded.
        ConfigError: the store cannot be made.
        BenchmarkError: the ways' answers differ.
    """
    rows, answers = [], []
    for way in (NONE, DEMAND, LEARNED, TOLD):
        with _engine(options, way) as engine:
            first, computed, tokens = _play(engine, options, told=way == TOLD)
            store = dict(engine.stats().store.get("prefill0", {}))
        answers.append(tokens)
        rows.append(
            {
                "way": way,
                "ttft_median": float(np.median(first)),
                "ttft_p95": float(np.percentile(first, 95)),
                "computed": float(np.mean(computed)),
                "store": store,
            }
        )
    if any(found != answers[0] for found in answers):
        raise BenchmarkError("the answers differ: a store must not change any")
    return {"options": asdict(options), "rows": rows}


@contextmanager
def _engine(options: AheadOptions, way: str) -> Iterator[Orchestrator]:
    pages = options.pool_pages
    config = ServeConfig(
        base=options.base,
        models=[ModelEntry(f"agent{i}") for i in range(options.agents)],
        dtype=options.dtype,
        max_model_len=options.longest,
        page_size=options.page_size,
        reply_kv="off",
        prefill=PrefillConfig(num_pages=pages, chunk_buckets=[64, 512]),
        decode=DecodeConfig(num_pages=pages, max_num_seqs=2, batch_buckets=[1]),
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if way != NONE:
            store = KvStoreConfig(
                path=str(Path(folder) / "pool"),
                bytes=options.store_bytes,
                prefetch="off" if way == DEMAND else "next-agent",
            )
            config = replace(config, kv_store=store)
        engine = Orchestrator.from_config(config)
        engine.start()
        if engine.store is not None:
            for tier in engine.store.service.tiers:
                _slow_down(tier, options.page_seconds)
        try:
            yield engine
        finally:
            engine.stop()


def _slow_down(tier: Tier, seconds: float) -> None:
    """Has reading a page take so much longer."""
    plain = tier.get

    def get(keys: Any, *others: Any) -> Any:
        time.sleep(seconds * len(keys))
        return plain(keys, *others)

    tier.get = get  # type: ignore[method-assign]


def _play(
    engine: Orchestrator, options: AheadOptions, *, told: bool
) -> tuple[list[float], list[int], list[tuple[int, ...]]]:
    """Seconds to first tokens and computed tokens of the counted calls, and all replies."""
    rng = np.random.default_rng(options.seed)
    vocabulary = engine.model_config.vocab_size
    contexts: dict[tuple[int, int], list[int]] = {}
    first, computed, replies = [], [], []
    for turn in range(options.rounds):
        for agent in range(options.agents):
            for session in range(options.sessions):
                grows = options.appended if turn else options.context
                context = contexts.setdefault((session, agent), [])
                context += rng.integers(0, vocabulary, grows).tolist()
                following = f"agent{(agent + 1) % options.agents}"
                hints = Session(f"s{session}", next_models=(following,) if told else ())
                id = f"{turn} {agent} {session}"
                seconds, tokens, reply = _call(engine, options, id, agent, context, hints)
                replies.append(reply)
                if turn:
                    first.append(seconds)
                    computed.append(tokens)
                time.sleep(options.pause)
    return first, computed, replies


def _call(
    engine: Orchestrator,
    options: AheadOptions,
    id: str,
    agent: int,
    context: list[int],
    session: Session,
) -> tuple[float, int, tuple[int, ...]]:
    events: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    params = SamplingParams(max_tokens=options.generated, temperature=0.0, ignore_eos=True)
    request = Request(id, f"agent{agent}", tuple(context), params, session=session)
    started = time.perf_counter()
    engine.submit(request, events.put)
    first, usage, tokens = 0.0, None, ()
    while True:
        event = events.get(timeout=120)
        first = first or (time.perf_counter() - started if event.token_ids else 0.0)
        usage, tokens = event.usage or usage, (*tokens, *event.token_ids)
        if event.finish_reason is not None:
            break
    assert usage is not None, event.error
    return first, usage.computed_tokens, tokens


def lines(result: dict[str, Any]) -> list[str]:
    """A Markdown table of a result."""
    shown = [
        "| | TTFT, ms (p95) | computed tokens a call | waited for the store, s | read ahead, MB, "
        "used, in vain |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        store = row["store"]
        early = [
            f"{store.get(name, 0) / 1e6:.0f}"
            for name in ("early_bytes", "early_used_bytes", "early_wasted_bytes")
        ]
        cells = [
            row["way"],
            f"{1e3 * row['ttft_median']:.0f} ({1e3 * row['ttft_p95']:.0f})",
            f"{row['computed']:.0f}",
            f"{store.get('stall_seconds', 0.0):.2f}",
            ", ".join(early),
        ]
        shown.append(f"| {' | '.join(cells)} |")
    return shown
