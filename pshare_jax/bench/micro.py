"""`bench micro`: prefill and decode speed of one model through the real engine, no HTTP.

What is measured is said in `micro_rates`. LoRA: as decode, eight rows of one random module, or two
rows each of four, in turn. With `vllm`, vLLM's engine is measured beside this one, each
repeat on both in turn; with `beside_weights` a second engine of this kind is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pshare_jax.bench.micro_rates import Rate, Rates
from pshare_jax.bench.micro_targets import MODEL, EngineTarget, Target, VllmTarget
from pshare_jax.bench.traces import Profile, read_profile, traced
from pshare_jax.config import (
    DecodeConfig,
    DType,
    ModelEntry,
    PrefillConfig,
    ServeConfig,
    WeightFormat,
)
from pshare_jax.convert.manifest import read_manifest
from pshare_jax.core.split_rule import LAST_TOKEN
from pshare_jax.engine.orchestrator import Orchestrator, compute_dtype, prepare_jax
from pshare_jax.engine.sources import BaseSource, ModelSource, checkpoint_sources
from pshare_jax.engine.weight_format import served_model
from pshare_jax.kernels.backends import backend_for
from pshare_jax.models.split import Certificate
from pshare_jax.models.weights import LORA_TARGETS, Weights, lora_specs

PREFILL_LENGTHS = (512, 2048)
BATCHES = (1, 8, 32)
LORA_MODULES, LORA_ROWS = 4, 8
OURS, VLLM, BESIDE = "pshare_jax", "vllm", "beside"
VLLM_KV_GIB = 3


@dataclass(frozen=True)
class VllmOptions:
    """Another engine, on the same machine.

    Args:
        python: an interpreter that has vLLM for CPUs installed.
        model: the same model as a Hugging Face folder; `convert export` makes one.
        preload: libraries that vLLM advises to load first (`LD_PRELOAD`): tcmalloc, libiomp5.
    """

    python: str
    model: str
    preload: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MicroOptions:
    """What is measured.

    Args:
        base: the prefill checkpoint.
        contexts: prompt tokens of each row while decoding, one measurement each.
        lora_rank: rank of four random LoRA modules on all projections that are measured too, at
            the first of `contexts`; 0 leaves them out.
        window: tokens a row in one decode window.
        repeats: prefills of each length, and decode windows of each batch; medians are reported.
        vllm: vLLM to measure beside this engine.
        page_size: token slots of a KV page.
        chunk: prefill chunk size, in tokens.
        dtype: as in the server's configuration.
        weights: as in the server's configuration.
        beside_weights: of a second engine, measured beside the first, if any.
        kernel_backend: as in the server's configuration.
        seed: of the random prompts.
        trace: folder for traces of JAX's profiler, of one prefill of each length and one decode
            window of each batch, taken after the measurements; empty takes none.
    """

    base: str = "checkpoints/smollm2-135m"
    contexts: list[int] = field(default_factory=lambda: [1024])
    lora_rank: int = 0
    window: int = 16
    repeats: int = 5
    vllm: VllmOptions | None = None
    page_size: int = 64
    chunk: int = 512
    dtype: DType = "auto"
    weights: WeightFormat = "plain"
    beside_weights: WeightFormat | None = None
    kernel_backend: str = "auto"
    seed: int = 0
    trace: str = ""


def serve_config(options: MicroOptions) -> ServeConfig:
    """An engine of one model with room for the largest batch."""
    context = max(options.contexts)
    longest = max(max(PREFILL_LENGTHS), context) + options.page_size
    max_model_len = max(longest, context + options.window * (options.repeats + 4))
    pages = -(-(context + max_model_len) * max(BATCHES) // options.page_size) // 2 + 1
    return ServeConfig(
        base=options.base,
        models=[ModelEntry(MODEL)],
        dtype=options.dtype,
        weights=options.weights,
        kernel_backend=options.kernel_backend,
        max_model_len=max_model_len,
        page_size=options.page_size,
        reply_kv="off",
        prefill=PrefillConfig(num_pages=pages, chunk_buckets=[options.chunk]),
        decode=DecodeConfig(num_pages=pages, batch_buckets=list(BATCHES)),
    )


def run(options: MicroOptions) -> dict[str, Any]:
    """Measures.

    Returns:
        `{"options", "backend", "dtype", "prefill": {length: rate},
        "decode": {context: {batch: rate}}, "lora": {rows: rate}, "profiles": {run: profile},
        "compiles"}`; with vLLM also `"vllm": {"packages", "prefill", "decode", "ratios"}`, where
        ratios are of this engine to vLLM, `{"prefill": {length: rate},
        "decode": {context: {batch: rate}}}`, each from the two rates of one repeat; with a second
        engine likewise `"beside": {"weights", "prefill", "decode", "ratios"}`.

    Raises:
        CheckpointError: the base cannot be loaded.
        EngineDeadError, BenchmarkError: an engine failed.
    """
    config = serve_config(options)
    prepare_jax(config)
    base, sources, dtype = _sources(config)
    if options.lora_rank:
        sources += [_random_lora(base, i, options.lora_rank, dtype) for i in range(LORA_MODULES)]
    engine = Orchestrator(config, base, sources)
    with ExitStack() as stack:
        beside: dict[str, Target] = {}
        if options.beside_weights:
            # Before the first: that one counts what the process compiles from its start on.
            second_config = replace(config, weights=options.beside_weights)
            second = Orchestrator(second_config, *_sources(second_config)[:2])
            second.start()
            stack.callback(second.stop)
            beside[BESIDE] = EngineTarget(second)
        engine.start()
        stack.callback(engine.stop)
        targets: dict[str, Target] = {OURS: EngineTarget(engine), **beside}
        vllm = _start_vllm(options.vllm, config) if options.vllm else None
        if vllm is not None:
            stack.callback(vllm.close)
            targets[VLLM] = vllm
        rates = _rates(options, config, targets, engine.model_config.vocab_size)
        rates.prefill(max(PREFILL_LENGTHS))  # the first run of everything is not counted
        prefill = {length: rates.prefill(length) for length in PREFILL_LENGTHS}
        decode = {
            context: {batch: rates.decode(context, [MODEL] * batch) for batch in BATCHES}
            for context in options.contexts
        }
        lora: dict[str, Rate] = {}
        if options.lora_rank:
            own = _rates(options, config, {OURS: targets[OURS]}, engine.model_config.vocab_size)
            lora = _lora(own, options.contexts[0])
        profiles: dict[str, Profile] = {}
        if options.trace:
            once = replace(options, repeats=1)
            ours = {OURS: targets[OURS]}
            profiles = _profiles(_rates(once, config, ours, engine.model_config.vocab_size), once)
        compiles = engine.stats().compiles
    result = {
        "options": asdict(options),
        "backend": backend_for(config.kernel_backend, jax.default_backend()),
        "dtype": dtype.name,
        **_figures(prefill, decode, lambda found: found[OURS]),
        "lora": {rows: asdict(rate) for rows, rate in lora.items()},
        "profiles": {name: asdict(profile) for name, profile in profiles.items()},
        "compiles": compiles,
    }
    if vllm is not None:
        result["vllm"] = {"packages": vllm.packages, **_peer(prefill, decode, VLLM)}
    if options.beside_weights:
        peer = _peer(prefill, decode, BESIDE)
        result["beside"] = {"weights": options.beside_weights, **peer}
    return result


def _sources(config: ServeConfig) -> tuple[BaseSource, list[ModelSource], jnp.dtype]:
    dtype = compute_dtype(config, served_model(config, read_manifest(config.base)))
    return *checkpoint_sources(config, dtype), dtype


Found = Mapping[str, Sequence[float]]
"""Name of a target to its rates, one a repeat."""


def _figures(
    prefill: Mapping[int, Found],
    decode: Mapping[int, Mapping[int, Found]],
    pick: Callable[[Found], Sequence[float]],
) -> dict[str, Any]:
    return {
        "prefill": {length: asdict(Rate.of(pick(found))) for length, found in prefill.items()},
        "decode": {
            context: {batch: asdict(Rate.of(pick(found))) for batch, found in batches.items()}
            for context, batches in decode.items()
        },
    }


def _peer(
    prefill: Mapping[int, Found], decode: Mapping[int, Mapping[int, Found]], name: str
) -> dict[str, Any]:
    """The figures of another target, and the ratios of this engine's to them."""

    def ratios(found: Found) -> list[float]:
        return [ours / theirs for ours, theirs in zip(found[OURS], found[name], strict=True)]

    theirs = _figures(prefill, decode, lambda found: found[name])
    return {**theirs, "ratios": _figures(prefill, decode, ratios)}


def _rates(
    options: MicroOptions, config: ServeConfig, targets: Mapping[str, Target], vocab: int
) -> Rates:
    room = config.max_model_len - max(options.contexts)
    return Rates(targets, vocab, room, options.window, options.repeats, options.seed)


def _start_vllm(vllm: VllmOptions, config: ServeConfig) -> VllmTarget:
    arguments = (vllm.model, config.max_model_len, max(BATCHES), VLLM_KV_GIB)
    return VllmTarget(vllm.python, *arguments, vllm.preload)


def _lora(rates: Rates, context: int) -> dict[str, Rate]:
    """Rates of rows of one LoRA module and of several, measured in turn."""
    rows = {
        "one module": [_lora_name(0)] * LORA_ROWS,
        "several modules": [_lora_name(i % LORA_MODULES) for i in range(LORA_ROWS)],
    }
    found: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(2):
        for name, models in rows.items():
            found[name] += rates.decode(context, models)[OURS]
    return {name: Rate.of(measured) for name, measured in found.items()}


def _profiles(rates: Rates, options: MicroOptions) -> dict[str, Profile]:
    runs: dict[str, Callable[[], object]] = {
        f"prefill-{length}": partial(rates.prefill, length) for length in PREFILL_LENGTHS
    }
    for context in options.contexts:
        for batch in BATCHES:
            runs[f"decode-{context}-{batch}"] = partial(rates.decode, context, [MODEL] * batch)
    profiles = {}
    for name, run_once in runs.items():
        folder = Path(options.trace) / name
        with traced(folder):
            run_once()
        profiles[name] = read_profile(folder)
    return profiles


def _lora_name(i: int) -> str:
    return f"lora{i}"


def _random_lora(base: BaseSource, i: int, rank: int, dtype: jnp.dtype) -> ModelSource:
    """A LoRA module on all projections, made up when it is loaded."""

    def load(shardings: Mapping[str, Any]) -> Weights:
        rng = np.random.default_rng(i)
        specs = lora_specs(base.config, rank, LORA_TARGETS)
        arrays = {
            name: jnp.asarray(0.01 * rng.standard_normal(spec.shape), dtype)
            for name, spec in specs.items()
        }
        return jax.device_put(arrays, shardings)

    certificate = Certificate(
        prefill_fingerprint=base.fingerprint,
        tail=LAST_TOKEN,
        kind="lora",
        cache_conditioned=True,
        weights_fingerprint=f"random-{i}",
        lora_rank=rank,
        lora_alpha=float(rank),
        lora_targets=LORA_TARGETS,
    )
    return ModelSource(_lora_name(i), "lora", "shared", load, certificate)
