"""What an engine with weights in some form adds to its process, for `bench weights`."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import jax

from pshare_jax.bench.micro_targets import MODEL
from pshare_jax.config import DecodeConfig, ModelEntry, PrefillConfig, ServeConfig, WeightFormat
from pshare_jax.convert.manifest import read_manifest
from pshare_jax.engine.devices import prepare_jax
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.errors import BenchmarkError
from pshare_jax.runtime.host_memory import return_freed_memory

NUM_PAGES = 9
"""Of each of an engine's two pools: next to nothing beside weights."""

PAGE_SIZE = 64

_STATUS = Path("/proc/self/status")


def grown_by(base: str, forms: Sequence[WeightFormat], processes: int) -> dict[str, list[int]]:
    """Bytes by which processes grew (`VmRSS`) when they made an engine on the CPU.

    Args:
        base: a prefill checkpoint.
        forms: of its weights.
        processes: for each form, one after the other, the forms in turn.

    Returns:
        For each form one number a process.

    Raises:
        BenchmarkError: a process was ended, or the system does not say what memory one has.
        CheckpointError: the base cannot be loaded.
        ConfigError: it cannot be served in that form.
    """
    found: dict[str, list[int]] = {form: [] for form in forms}
    for _ in range(processes):
        for form in forms:
            found[form].append(_in_a_process(base, form))
    return found


def _in_a_process(base: str, form: WeightFormat) -> int:
    # A fresh one: what another engine has freed would be used again, and not be counted.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        try:
            return process.submit(_growth, base, form).result()
        except BrokenProcessPool:
            raise BenchmarkError(
                f"{base}: the process that made an engine with weights: {form} was ended; the "
                "machine may lack memory (--processes=0 leaves this measurement out)"
            ) from None


def _growth(base: str, form: WeightFormat) -> int:
    """What this process grows by when it makes an engine that is not started."""
    longest = (NUM_PAGES - 1) * PAGE_SIZE
    config = ServeConfig(
        base=base,
        models=[ModelEntry(MODEL)],
        weights=form,
        max_model_len=min(longest, read_manifest(base).config.max_position_embeddings),
        page_size=PAGE_SIZE,
        prefill=PrefillConfig(num_pages=NUM_PAGES),
        decode=DecodeConfig(num_pages=NUM_PAGES),
    )
    jax.config.update("jax_platforms", "cpu")
    prepare_jax(config)
    jax.devices()  # starts JAX, which is no part of the engine
    before = _resident_bytes()
    engine = Orchestrator.from_config(config)
    # As a server does before it takes requests.
    gc.collect()
    return_freed_memory()
    grown = _resident_bytes() - before
    del engine
    return grown


def _resident_bytes() -> int:
    if not _STATUS.is_file():
        raise BenchmarkError(
            f"{_STATUS}: this system has none, so memory cannot be measured; use --processes=0"
        )
    lines = _STATUS.read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith("VmRSS:"))
    return int(kib) * 1024
