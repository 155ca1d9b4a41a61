"""`bench moving`: what replies notice when the mesh that generates them is given to prefill.

An engine of three meshes that may do either, one of which begins with prefill. Some replies are
generated, once in peace, and once with one of the two decode meshes given to prefill in the middle
and given back in the end. The tokens must be the same. On a CPU the meshes share one processor, so
this measures what moving costs, and not what more prefill gives: for that see `bench shift`.
"""

from __future__ import annotations

import queue
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pshare_jax.bench.micro_targets import MODEL
from pshare_jax.config import (
    DecodeConfig,
    DType,
    ModelEntry,
    PrefillConfig,
    RouterConfig,
    ServeConfig,
)
from pshare_jax.core.requests import Request, RequestOutput, SamplingParams
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.errors import BenchmarkError

GIVEN, TWIN = "prefill2", "decode2"


@dataclass(frozen=True)
class MovingOptions:
    """What is measured.

    Args:
        base: the prefill checkpoint.
        replies: that are generated at once.
        context: prompt tokens of each, all different.
        generated: tokens of each.
        page_size: token slots of a KV page.
        dtype: as in the server's configuration.
        seed: of the random prompts.
    """

    base: str = "checkpoints/smollm2-135m"
    replies: int = 8
    context: int = 512
    generated: int = 96
    page_size: int = 64
    dtype: DType = "auto"
    seed: int = 0


def run(options: MovingOptions) -> dict[str, Any]:
    """Measures.

    Returns:
        `{"options", "moved": rows, "moved_bytes", "compiles", "pause": {"moved", "stayed", "in
        peace"}}`: the longest pauses between two tokens of a reply in seconds, `[median, worst]`.

    Raises:
        CheckpointError: the base cannot be loaded.
        BenchmarkError: tokens differ, or no row has moved.
    """
    engine = Orchestrator.from_config(_config(options))
    engine.start()
    try:
        _play(engine, options, "warm")
        peace = _play(engine, options, "peace")
        moving = _play(engine, options, "moving", gives=True)
        stats = [worker.core.stats for worker in engine.workers.decode]
        rows, pages = stats[2].moved_rows, sum(s.moved_pages for s in stats)
        page_bytes = engine._layout.bytes_per_page
        compiles = engine.stats().compiles
    finally:
        engine.stop()
    if [tokens for tokens, *_ in peace] != [tokens for tokens, *_ in moving]:
        raise BenchmarkError("tokens differ: moving must not change any")
    if not rows:
        raise BenchmarkError("no row has moved; ask for more or longer replies")
    moved = {place for _, _, place in moving}
    pauses = {"in peace": [pause for _, pause, _ in peace]}
    for name, where in (("moved", TWIN), ("stayed", "decode1")):
        if where in moved:
            pauses[name] = [pause for _, pause, place in moving if place == where]
    return {
        "options": asdict(options),
        "moved": rows,
        "moved_bytes": pages * page_bytes,
        "compiles": compiles,
        "pause": {k: [float(np.median(v)), max(v)] for k, v in pauses.items()},
    }


def _config(options: MovingOptions) -> ServeConfig:
    longest = options.context + options.generated + 2
    pages = (options.replies + 1) * -(-longest // options.page_size) + 2
    slots = options.replies
    return ServeConfig(
        base=options.base,
        models=[ModelEntry(MODEL)],
        dtype=options.dtype,
        max_model_len=longest,
        page_size=options.page_size,
        connector="device_put",
        reply_kv="off",
        prefill=PrefillConfig(engines=1, num_pages=pages, chunk_buckets=[128, 512]),
        decode=DecodeConfig(
            engines=2, num_pages=pages, max_num_seqs=slots, batch_buckets=[1, slots]
        ),
        router=RouterConfig(roles="flexible", backlog_tokens=0),
    )


def _play(
    engine: Orchestrator, options: MovingOptions, name: str, *, gives: bool = False
) -> list[tuple[tuple[int, ...], float, str]]:
    """All replies: their tokens, their longest pauses, and the decode worker that began them."""
    rng = np.random.default_rng(options.seed)
    events: queue.SimpleQueue[tuple[float, RequestOutput]] = queue.SimpleQueue()
    params = SamplingParams(max_tokens=options.generated, temperature=0.0, ignore_eos=True)
    for i in range(options.replies):
        prompt = rng.integers(0, engine.model_config.vocab_size, options.context)
        engine.submit(
            Request(f"{name}{i}", MODEL, tuple(prompt.tolist()), params),
            lambda event: events.put((time.perf_counter(), event)),
        )
    tokens: dict[str, list[int]] = {f"{name}{i}": [] for i in range(options.replies)}
    times: dict[str, list[float]] = {id: [] for id in tokens}
    places: dict[str, str] = dict.fromkeys(tokens, "")
    left, given = len(tokens), False
    while left:
        at, event = events.get(timeout=120)
        tokens[event.request_id] += event.token_ids
        times[event.request_id] += [at] * bool(event.token_ids)
        left -= event.finish_reason is not None
        if gives and not given and min(map(len, tokens.values())) > options.generated // 3:
            given = True
            places.update(_places(engine, name))
            engine.give_mesh(GIVEN)
    if given:
        engine.give_mesh(TWIN)
    return [
        (tuple(tokens[id]), float(max(np.diff(times[id]), default=0.0)), places[id])
        for id in tokens
    ]


def _places(engine: Orchestrator, name: str) -> dict[str, str]:
    """Where replies are generated at this moment, by request."""
    live = list(engine._dispatcher._live.values())
    return {
        one.request.id: one.sequence.decode_worker
        for one in live
        if one.sequence is not None and one.request.id.startswith(name)
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The result as lines of text."""
    size = f"{result['moved_bytes'] / 1e6:.1f} MB"
    shown = [
        f"{result['moved']} of {result['options']['replies']} replies moved, {size}; the same "
        f"tokens; {result['compiles']} compilations.",
        "Longest pause of a reply, ms, median and worst:",
    ]
    return shown + [
        f"  {name}: {1e3 * median:.0f}, {1e3 * worst:.0f}"
        for name, (median, worst) in result["pause"].items()
    ]
