"""`bench restart`: the first token over a known context after a restart, with and without a store.

An engine with a store answers some prompts that nobody has asked before, and ends. A second one,
which finds the store, answers the same prompts; so does one without a store. All in one process,
one prompt at a time; the time is from submission to the first token.
"""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pshare_jax.bench.first_token import engine_of, first_token, settle
from pshare_jax.bench.micro_rates import Rate
from pshare_jax.config import DType, KvCodec, KvStoreConfig
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.errors import BenchmarkError

BEFORE, AFTER, WITHOUT = "before, with a store", "after, with a store", "after, without"


@dataclass(frozen=True)
class RestartOptions:
    """What is measured.

    Args:
        base: the prefill checkpoint.
        tokens: of a prompt.
        prompts: how many are asked.
        page_size: token slots of a KV page.
        codec: as in the server's configuration.
        dtype: likewise.
        folder: where the store's file is made, and removed in the end.
        store_bytes: of that file.
        seed: of the random prompts.
    """

    base: str = "checkpoints/smollm2-135m"
    tokens: int = 2000
    prompts: int = 3
    page_size: int = 64
    codec: KvCodec = "auto"
    dtype: DType = "auto"
    folder: str = "/dev/shm"
    store_bytes: int = 2**28
    seed: int = 0


def run(options: RestartOptions) -> dict[str, Any]:
    """Measures all three.

    Returns:
        `{"options", "seconds": {which: rate}, "computed": {which: tokens of each prompt},
        "ratio": without / with a store, "tiers": what the second engine read, "prices"}`.

    Raises:
        CheckpointError: the base cannot be loaded.
        ConfigError: the store cannot be made.
        BenchmarkError: the engines' answers differ.
    """
    seconds: dict[str, list[float]] = {}
    computed: dict[str, list[int]] = {}
    answers: dict[str, list[tuple[int, ...]]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store = KvStoreConfig(
            path=str(Path(folder) / "pool"), bytes=options.store_bytes, codec=options.codec
        )
        tiers: dict[str, Any] = {}
        prices: dict[str, Any] = {}
        for which, config in ((BEFORE, store), (AFTER, store), (WITHOUT, KvStoreConfig())):
            with _engine(options, config) as engine:
                prompts = _prompts(options, engine)
                found = [first_token(engine, f"r{i}", prompt) for i, prompt in enumerate(prompts)]
                if config.path:
                    settle(engine)
                if which == AFTER and engine.store is not None:
                    tiers = {name: asdict(tier) for name, tier in engine.stats().tiers.items()}
                    prices = msgspec.to_builtins(engine.store.prices, str_keys=True)
            seconds[which] = [one.seconds for one in found]
            computed[which] = [one.computed for one in found]
            answers[which] = [one.tokens for one in found]
    if len({str(a) for a in answers.values()}) != 1:
        raise BenchmarkError("the engines' answers differ: a store must not change any")
    ratios = [w / a for w, a in zip(seconds[WITHOUT], seconds[AFTER], strict=True)]
    return {
        "options": asdict(options),
        "seconds": {which: asdict(Rate.of(values)) for which, values in seconds.items()},
        "computed": computed,
        "ratio": asdict(Rate.of(ratios)),
        "tiers": tiers,
        "prices": prices,
    }


def _engine(options: RestartOptions, store: KvStoreConfig) -> AbstractContextManager[Orchestrator]:
    sizes = options.tokens, options.prompts, options.page_size
    return engine_of(options.base, options.dtype, *sizes, store)


def _prompts(options: RestartOptions, engine: Orchestrator) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(options.seed)
    vocabulary = engine.model_config.vocab_size
    return [
        tuple(rng.integers(0, vocabulary, options.tokens).tolist()) for _ in range(options.prompts)
    ]


def lines(result: dict[str, Any]) -> list[str]:
    """The result as lines of text."""
    options = result["options"]
    shown = [f"First token over {options['tokens']} tokens, {options['prompts']} prompts:"]
    for which, rate in result["seconds"].items():
        shown.append(
            f"  {which}: {1e3 * rate['median']:.0f} ms ({1e3 * rate['low']:.0f} .. "
            f"{1e3 * rate['high']:.0f}), computed tokens {result['computed'][which]}"
        )
    shown.append(f"  without / with: {result['ratio']['median']:.1f}")
    return shown
