"""`bench masks`: decode steps whose tokens follow a grammar, beside free ones.

Batches of distinct prompts decode with one engine, free and under a JSON schema in turn, greedily
and at temperature 1. The schema's answer is long and has next to no forced tokens, so that every
token costs a step and a mask.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pshare_jax.bench.machine import describe
from pshare_jax.bench.micro_rates import Rate, Rates
from pshare_jax.bench.micro_targets import MODEL, EngineTarget
from pshare_jax.config import DecodeConfig, DType, ModelEntry, PrefillConfig, ServeConfig
from pshare_jax.core.constraints import GrammarSpec
from pshare_jax.core.requests import SamplingParams
from pshare_jax.engine.orchestrator import Orchestrator

SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "anyOf": [
            {"type": "string", "minLength": 20},
            {"type": "array", "items": {"type": "number"}, "minItems": 20},
        ]
    },
}
FREE, MASKED = "free", "masked"
WAYS = {"greedy": 0.0, "temperature 1": 1.0}


@dataclass(frozen=True)
class MasksOptions:
    """What is measured.

    Args:
        base: the prefill checkpoint.
        batch: rows of a step.
        context: prompt tokens of each row.
        window: tokens of each row in one repeat.
        repeats: windows of each kind.
        page_size: token slots of a KV page.
        dtype: as in the server's configuration.
        seed: of the random prompts.
        clock: `wall`, or `cpu`: processor time of all threads, which tells more where the machine
            does other things too.
    """

    base: str = "checkpoints/smollm2-135m"
    batch: int = 8
    context: int = 32
    window: int = 64
    repeats: int = 5
    page_size: int = 64
    dtype: DType = "auto"
    seed: int = 0
    clock: Literal["wall", "cpu"] = "wall"


def run(options: MasksOptions) -> dict[str, Any]:
    """Measures all kinds in turn.

    Returns:
        `{"options", "machine", "rates": {way: {kind: rate}}, "cost": {way: rate}, "least_cost":
        {way: number}}`: tokens a second, and how many times a free step a masked one takes, one a
        repeat, and in the fastest windows, which what else the machine does disturbs least.

    Raises:
        CheckpointError: the base cannot be loaded.
    """
    longest = options.context + 4 * options.window + 64
    pages = (options.batch + 2) * -(-longest // options.page_size) + 1
    engine = Orchestrator.from_config(
        ServeConfig(
            base=options.base,
            models=[ModelEntry(MODEL)],
            dtype=options.dtype,
            max_model_len=longest,
            page_size=options.page_size,
            prefill=PrefillConfig(num_pages=pages, chunk_buckets=[options.page_size]),
            decode=DecodeConfig(
                num_pages=pages, max_num_seqs=options.batch, batch_buckets=[options.batch]
            ),
        )
    )
    engine.start()
    try:
        targets = {
            f"{way}, {kind}": EngineTarget(
                engine,
                SamplingParams(
                    temperature=temperature,
                    ignore_eos=True,
                    grammar=GrammarSpec("json_schema", json.dumps(SCHEMA))
                    if kind == MASKED
                    else None,
                ),
            )
            for way, temperature in WAYS.items()
            for kind in (FREE, MASKED)
        }
        vocab, room = engine.model_config.vocab_size, longest - options.context - 1
        rates = Rates(
            targets,
            vocab,
            room,
            options.window,
            options.repeats + 1,
            options.seed,
            time.process_time if options.clock == "cpu" else time.perf_counter,
        )
        # The first round is not counted.
        found = {
            name: values[1:]
            for name, values in rates.decode(options.context, [MODEL] * options.batch).items()
        }
    finally:
        engine.stop()
    return {
        "options": asdict(options),
        "machine": describe(),
        "rates": {
            way: {kind: asdict(Rate.of(found[f"{way}, {kind}"])) for kind in (FREE, MASKED)}
            for way in WAYS
        },
        "cost": {
            way: asdict(Rate.of(_costs(found[f"{way}, {FREE}"], found[f"{way}, {MASKED}"])))
            for way in WAYS
        },
        "least_cost": {
            way: max(found[f"{way}, {FREE}"]) / max(found[f"{way}, {MASKED}"]) for way in WAYS
        },
    }


def _costs(free: list[float], masked: list[float]) -> list[float]:
    return [one / other for one, other in zip(free, masked, strict=True)]


def lines(result: dict[str, Any]) -> list[str]:
    """A Markdown table of a result."""
    of = " of processor time" if result["options"]["clock"] == "cpu" else ""
    rows = [
        f"| decode at {result['options']['context']} tokens, batch {result['options']['batch']}, "
        f"tokens/s{of} | free | masked | a masked step takes | in the fastest windows |",
        "|---|--:|--:|--:|--:|",
    ]
    for way, rates in result["rates"].items():
        cost = result["cost"][way]
        cells = [f"{rates[kind]['median']:,.0f}" for kind in (FREE, MASKED)]
        spread = f"{cost['median']:.2f} ({cost['low']:.2f} - {cost['high']:.2f}) times"
        least = f"{result['least_cost'][way]:.2f}"
        rows.append(f"| {way} | {' | '.join(cells)} | {spread} | {least} |")
    return rows
