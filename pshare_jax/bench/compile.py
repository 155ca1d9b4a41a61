"""`bench compile`: do kernels and steps compile for accelerators, and do they fit?

The production compilers of TPU and CUDA run without the hardware, so that this needs none: weights
and pages are abstract. It proves that programs compile and what memory they take; it measures no
speed. Times in the table are the compiler's estimate, where it gives one, and a floor computed from
the hardware's published bandwidth and peak.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax

from pshare_jax.bench import compile_report, shared_prefix
from pshare_jax.bench.accelerators import ACCELERATORS, Accelerator, prepare
from pshare_jax.bench.compile_kernels import KERNEL_CASES, kernel_program
from pshare_jax.bench.compile_models import MODELS
from pshare_jax.bench.compile_programs import Program, Sizes, one_chip_programs, step_programs
from pshare_jax.bench.hbm_traffic import hbm_bytes
from pshare_jax.bench.shared_prefix_programs import SHARED_CASES, attention_program
from pshare_jax.bench.training_programs import training_programs
from pshare_jax.errors import ConfigError

_UNTIMED = 'custom_call_target="ConcatBitcast"'
_ALL_GATHER = re.compile(r"= \(?(\w+)\[([\d,]*)\][^=]*? all-gather(?:-start)?\(")
_ITEM_BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "f16": 2, "u8": 1, "s8": 1}


@dataclass(frozen=True)
class CompileOptions:
    """What is compiled.

    Args:
        accelerators: names of machines; all if empty.
        models: names of models; all if empty.
        kernels: whether to compile the kernels alone.
        serving: whether to compile the steps of the engine.
        one_chip: models that are compiled for one chip, with LoRA modules over one pool.
        training: whether to compile the steps of the trainer.
        shared_prefix: whether to count what reading shared pages once saves.
        layers: number of layers; 0 keeps the models'. Fewer compile faster and mean less.
        sizes: sizes of the steps.
    """

    accelerators: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    kernels: bool = True
    serving: bool = True
    one_chip: list[str] = field(default_factory=lambda: ["Llama-3.1-8B"])
    training: bool = True
    shared_prefix: bool = True
    layers: int = 0
    sizes: Sizes = field(default_factory=Sizes)


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program; bytes are of one device.

    `pool_bytes` of pages were given; `largest_pool_tokens` would fit beside everything else.
    `pool_in_place`: the pages given are the pages returned, and neither a temporary nor an
    all-gather is as large as one layer of them; None where there is no pool. `total_bytes` includes
    what else must lie in memory meanwhile. `hbm_bytes` are counted from the program of a decode
    step for a TPU (see `hbm_traffic`), with the KV that it reads. `accessed_bytes` and
    `estimated_seconds` are the compiler's, None where it gives none; `no_estimate` says why there
    is no time. `floor_seconds` is the roofline.
    """

    compile_seconds: float
    weight_bytes: int
    pool_bytes: int
    temp_bytes: int
    code_bytes: int
    total_bytes: int
    largest_pool_tokens: int | None
    pool_in_place: bool | None
    accessed_bytes: float | None
    hbm_bytes: float | None
    least_bytes: float
    estimated_seconds: float | None
    no_estimate: str | None
    floor_seconds: float


@dataclass(frozen=True)
class Outcome:
    """One row of the table: either `compiled` or `error` is there; `mesh` as in `Program`."""

    accelerator: str
    model: str
    program: str
    compiled: Compiled | None = None
    error: str | None = None
    mesh: str = ""


def compile_program(accelerator: Accelerator, program: Program, layers: int) -> Compiled:
    """Compiles one program and reads what the compiler says of it.

    Args:
        accelerator: what it is compiled for.
        program: what is compiled.
        layers: of the whole model.

    Raises:
        Exception: whatever the compiler refuses it with.
    """
    started = time.perf_counter()
    with device_of(accelerator, program.arguments):
        lowered = program.function.lower(*program.arguments)
    compiled = lowered.compile(compiler_options=dict(program.compiler_options) or None)
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    # Outputs that are not written over an argument take memory of their own.
    new_outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + max(new_outputs, 0)
    total += program.resident_bytes
    other = total - program.pool_bytes
    text = compiled.as_text()
    in_place = _pool_in_place(program, layers, memory, text) if program.pool_bytes else None
    floor = max(program.least_bytes / accelerator.bandwidth, program.least_flops / accelerator.peak)
    estimate, no_estimate = time_estimate(cost.get("optimal_seconds"), floor, text)
    tokens = None
    if program.bytes_per_token:
        tokens = max(int((accelerator.memory - other) // program.bytes_per_token), 0)
    return Compiled(
        compile_seconds=seconds,
        weight_bytes=program.weight_bytes,
        pool_bytes=program.pool_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        total_bytes=total,
        largest_pool_tokens=tokens,
        pool_in_place=in_place,
        accessed_bytes=cost.get("bytes accessed"),
        hbm_bytes=_hbm_bytes(accelerator, program, layers, text),
        least_bytes=program.least_bytes,
        estimated_seconds=estimate,
        no_estimate=no_estimate,
        floor_seconds=floor,
    )


def device_of(accelerator: Accelerator, arguments: Any) -> AbstractContextManager[Any]:
    """Tells Pallas' Triton kernels which GPU they are for, which jax 0.12 asks the context of.

    Args:
        accelerator: what is lowered for while the context lasts.
        arguments: pytree of abstract arrays, whose sharding is that of a mesh.
    """
    if accelerator.platform != "cuda" or jax.__version_info__ < (0, 12):
        return nullcontext()
    mesh = next(a.sharding.mesh for a in jax.tree.leaves(arguments))
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _hbm_bytes(accelerator: Accelerator, program: Program, layers: int, hlo: str) -> float | None:
    if accelerator.platform != "tpu" or not program.pages_read:
        return None
    return hbm_bytes(hlo, program.pool_bytes // layers) + program.pages_read


def _pool_in_place(program: Program, layers: int, memory: Any, hlo: str) -> bool:
    donates_pool = program.name != "handoff: gather"
    compiled_pool = program.pool_bytes - program.resident_pool_bytes
    limit = max(program.pool_bytes / max(layers, 1), 2**20)
    return (
        (memory.alias_size_in_bytes >= compiled_pool or not donates_pool)
        and memory.temp_size_in_bytes < limit
        and largest_all_gather(hlo) < limit
    )


def time_estimate(seconds: float | None, floor: float, hlo: str) -> tuple[float | None, str | None]:
    """The compiler's time where it can be one, or else why there is none.

    XLA for TPUs books about -1 s for each `ConcatBitcast` call, which it cannot time, and nothing
    for Pallas kernels without a cost of their own or for the further rounds of a loop. What is
    below the roofline floor is no time of the whole program.

    Args:
        seconds: `optimal_seconds` of the compiler's cost analysis, None when it has none.
        floor: the roofline floor in seconds.
        hlo: the compiled program's text.
    """
    if seconds is None:
        return None, "the compiler gives none"
    if seconds >= floor:
        return seconds, None
    if seconds >= 0:
        return None, f"{1000 * seconds:.2f} ms is below the floor, so parts are left out"
    if untimed := hlo.count(_UNTIMED):
        return None, f"{seconds:.2f} s: about -1 s for each of {untimed} ConcatBitcast calls"
    return None, f"{seconds:.2f} s: negative, cause unknown"


def largest_all_gather(hlo: str) -> int:
    """Bytes of the largest result of an all-gather in a compiled program's text."""
    sizes = [0]
    for dtype, shape in _ALL_GATHER.findall(hlo):
        count = 1
        for size in filter(None, shape.split(",")):
            count *= int(size)
        sizes.append(count * _ITEM_BYTES.get(dtype, 8))
    return max(sizes)


def outcomes(options: CompileOptions) -> Iterator[Outcome]:
    """Compiles everything, one row at a time; what a compiler refuses is a row with its error.

    Raises:
        ConfigError: an unknown name, or a compiler that is not installed.
    """
    models = _known("models", options.models, MODELS)
    for name in _known("accelerators", options.accelerators, ACCELERATORS):
        accelerator = ACCELERATORS[name]
        if options.kernels:
            for case in KERNEL_CASES:
                program = kernel_program(accelerator, case)
                yield _outcome(accelerator, "", program, 1)
            for case in SHARED_CASES:
                program = attention_program(accelerator, case, 2048, shared=True)
                yield _outcome(accelerator, "", program, 1)
        for model in models:
            config = MODELS[model]
            if options.layers:
                config = replace(config, num_layers=options.layers)
            if options.serving:
                for program in step_programs(accelerator, config, options.sizes):
                    yield _outcome(accelerator, model, program, config.num_layers)
            if options.serving and model in options.one_chip:
                for program in one_chip_programs(accelerator, config, options.sizes):
                    alone = replace(accelerator, name=name + compile_report.ONE_CHIP)
                    yield _outcome(alone, model, program, config.num_layers)
            if options.training:
                for program in training_programs(accelerator, config, options.sizes):
                    yield _outcome(accelerator, model, program, config.num_layers)


def _known(option: str, names: list[str], table: dict[str, Any]) -> list[str]:
    if unknown := [name for name in names if name not in table]:
        raise ConfigError(f"{option}: unknown {unknown[0]!r}; choose from {', '.join(table)}")
    return names or list(table)


def _outcome(accelerator: Accelerator, model: str, program: Program, layers: int) -> Outcome:
    row = Outcome(accelerator.name, model, program.name, mesh=program.mesh)
    try:
        return replace(row, compiled=compile_program(accelerator, program, layers))
    except Exception as error:  # compilers raise many types; a refusal is a result here
        return replace(row, error=" ".join(str(error).split())[:300])


def run(
    options: CompileOptions,
    on_outcome: Callable[[Outcome, dict[str, Any]], None] = lambda _, __: None,
) -> dict[str, Any]:
    """Compiles; returns `{"options", "jax", "outcomes": [...], "shared_prefix"}` as plain data.

    Args:
        options: what to compile.
        on_outcome: told of every row when it is there, and given the result so far.

    Raises:
        ConfigError: an unknown name, or a compiler that is not installed.
    """
    prepare()
    rows: list[dict[str, Any]] = []
    result = {"options": asdict(options), "jax": jax.__version__, "outcomes": rows}
    for outcome in outcomes(options):
        rows.append(asdict(outcome))
        on_outcome(outcome, result)
    if options.shared_prefix:
        names = options.accelerators or list(ACCELERATORS)
        result["shared_prefix"] = shared_prefix.run(shared_prefix.SharedPrefixOptions(), names)
    return result
