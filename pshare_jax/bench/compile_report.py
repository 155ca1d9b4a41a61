"""The tables of `bench compile`: for the terminal, and docs/accelerators.md."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from pshare_jax.bench import shared_prefix
from pshare_jax.bench.accelerators import ACCELERATORS
from pshare_jax.bench.compile_programs import Sizes
from pshare_jax.core.buckets import TRANSFER_BUCKETS

ONE_CHIP = ", one chip"
"""Ends the machine's name in rows of one of its chips alone."""

_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")

_STEP_HEADER = (
    "| machine | step | weights | KV pool given | temporaries | total of memory | pool in place "
    "| largest pool, tokens | HBM / least | bytes accessed / least | compile | estimate | floor |\n"
    "|---|---|--:|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|"
)
_INTRODUCTION = """\
Made by `.venv-compile/bin/python -m pshare_jax.bench compile --markdown docs/accelerators.md`. The
production compilers of TPU and CUDA compile without the hardware; nothing here ran on an
accelerator, and no figure is a measured speed. `--merge` keeps the rows of earlier runs (`--json`).

On a machine with a TPU, `python -m pytest tests/kernels/test_on_hardware.py -m tpu --platform tpu`
checks the kernels' numbers there; on one with an NVIDIA GPU, `-m gpu --platform cuda`.
[`bench hardware`](hardware.md) measures such a machine.

The GPU kernels are Pallas on Triton. JAX 0.12 still compiles them, and warns that a later version
will not. A device of TPU7x (Ironwood) is half a chip: its compilers know it as `tpu7x:2x2x1`.
"""
_STEPS = """\
Prefill chunk: {chunk} tokens, the last of a prompt of {context}. Decode step: {batch} rows at
position {context}; the executable for shared contexts is another, for rows that all have the same
context. Handoff: {transfer_pages} pages of {page_size} tokens. **One chip**:
prefill and decode over one pool, one set of weights, {lora_modules} LoRA modules of rank
{lora_rank}. All in bfloat16; bytes are of one device.

- **KV pool given**: half of what the weights leave. **Largest pool**: what fits beside all else.
- **Pool in place**: the pages returned are those given, and neither a temporary nor an all-gather
  is as large as one layer of them.
- **HBM**: what a TPU's decode step reads from HBM and writes to it, counted from the compiled
  program's text, its KV added; **least** is the weights that the step reads plus the KV of all its
  rows. **Bytes accessed** are XLA's estimate of the same: it counts what it prefetches into on-chip
  memory twice more, every branch of the sampler although greedy decoding takes none, and the KV of
  a chunk once for each tile of queries.
- **Estimate** is XLA's time where it can be one, else the reason why there is none. It leaves out
  loops and what it cannot time: less than the floor, or less than nothing, is no time.
- **Floor** is the larger of least bytes over bandwidth and operations over peak; communication is
  not in it.
- **Compile** is the time that it took beside whatever else the machine did: at most so long.
- `-`: the compiler gives no figure.
"""
_TRAINING_HEADER = (
    "| machine | mesh | step | weights and moments | temporaries | total of memory | fits "
    "| compile | estimate | floor |\n|---|---|---|--:|--:|--:|---|--:|--:|--:|"
)
_TRAINING = """\
Micro-batches of {train_batch} rows: {train_prompt} prompt tokens, read from the base's KV, and
{train_answer} answer tokens; bfloat16 computation, float32 masters, moments and gradients, remat.
The mesh is data x fsdp x tensor, over all devices of the machine. A step is `gradients`, then
`update`; `base KV` is computed once for all epochs.{layers} For TPUs XLA compiles these with its
least effort (`optimization_level` and `memory_fitting_level` O0): a backward pass
takes it 20 times as long otherwise. Temporaries and estimates are those of such a program.

- **Total of memory** counts what lies beside the program: moments during `gradients`, masters
  during `base KV`, the frozen base during `update`. An error row is refused by the compiler.
- **Floor** reads every argument and writes every result once.
"""
_KERNEL_HEADER = "| kernel pair | " + " | ".join(ACCELERATORS) + " |"


def line(outcome: dict[str, Any]) -> str:
    """One row for the terminal."""
    name = " ".join(filter(None, (outcome["accelerator"], outcome["model"], outcome["program"])))
    if (compiled := outcome["compiled"]) is None:
        return f"{name}: {outcome['error']}"
    where = {True: ", in place", False: ", COPIES THE POOL", None: ""}[compiled["pool_in_place"]]
    return (
        f"{name}: compiles in {compiled['compile_seconds']:.1f} s, "
        f"{_gib(compiled['total_bytes'])} GiB{where}"
    )


def merged(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last of several runs, with the others' rows too, in order of first appearance.

    Of the same program the last run's row counts; the shared prefixes are those of the last run
    that looked at them.
    """
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    whole: dict[str, Any] = {}
    for result in results:
        whole |= result
        for outcome in result["outcomes"]:
            rows[outcome["accelerator"], outcome["model"], outcome["program"]] = outcome
    return {**whole, "outcomes": list(rows.values())}


def markdown(result: dict[str, Any]) -> str:
    """docs/accelerators.md."""
    sizes = result["options"]["sizes"]
    # Results that are older than the engine's present limit say how many pages they moved.
    transfer = sizes.get("transfer", max(TRANSFER_BUCKETS))
    outcomes = result["outcomes"]
    parts = [
        "# Accelerators\n",
        _INTRODUCTION,
        f"Compilers: {_versions()}.\n",
        "## Machines\n",
        "| machine | prefill mesh | decode mesh | memory a device | bandwidth | bfloat16 peak |\n"
        "|---|--:|--:|--:|--:|--:|",
        *(
            f"| {a.name} | {a.prefill} | {a.decode} | {_gib(a.memory)} GiB "
            f"| {a.bandwidth / 1e9:,.0f} GB/s | {a.peak / 1e12:,.0f} TFLOP/s |"
            for a in ACCELERATORS.values()
        ),
        "\n## Steps\n",
        _STEPS.format(**asdict(Sizes()) | sizes, transfer_pages=transfer),
    ]
    parts += _by_model([o for o in outcomes if not o.get("mesh")], _STEP_HEADER, _step_row)
    if training := [o for o in outcomes if o.get("mesh")]:
        depth = result["options"]["layers"]
        layers = f" Models cut to {depth} layers." if depth else ""
        parts += ["## Training\n", _TRAINING.format(**sizes, layers=layers)]
        parts += _by_model(training, _TRAINING_HEADER, _training_row)
        parts += _missing(outcomes, training)
    if "shared_prefix" in result:
        parts += shared_prefix.markdown(result["shared_prefix"])
    kernels = [o for o in outcomes if not o["model"]]
    if kernels:
        parts += [
            "## Kernels\n",
            "`kv_write` and `paged_attention`, or `shared_prefix_attention`, of one layer on one "
            "device:\nseconds to compile, or the error.\n",
            _KERNEL_HEADER,
            "|---|" + "--:|" * len(ACCELERATORS),
        ]
        parts += [
            _kernel_row(program, kernels)
            for program in dict.fromkeys(o["program"] for o in kernels)
        ]
    return "\n".join(parts).rstrip() + "\n"


def _by_model(
    outcomes: list[dict[str, Any]], header: str, row: Callable[[dict[str, Any]], str]
) -> list[str]:
    parts = []
    for model in dict.fromkeys(o["model"] for o in outcomes if o["model"]):
        parts += [f"### {model}\n", header]
        parts += [row(o) for o in outcomes if o["model"] == model]
        parts.append("")
    return parts


def _missing(outcomes: list[dict[str, Any]], training: list[dict[str, Any]]) -> list[str]:
    """Names what has no training row, so that no gap is silent."""
    models = dict.fromkeys(o["model"] for o in outcomes if o["model"])
    there = {(o["model"], o["accelerator"]) for o in training}
    gaps = [f"{m} on {a}" for m in models for a in ACCELERATORS if (m, a) not in there]
    return [f"Training not compiled in this run: {', '.join(gaps)}.\n"] if gaps else []


def _training_row(outcome: dict[str, Any]) -> str:
    head = f"| {outcome['accelerator']} | {outcome['mesh']} | {outcome['program']} "
    if (c := outcome["compiled"]) is None:
        return f"{head}| {outcome['error']} |" + " |" * 6
    share = c["total_bytes"] / ACCELERATORS[outcome["accelerator"]].memory
    cells = (
        f"{_gib(c['weight_bytes'])} GiB",
        f"{c['temp_bytes'] / 2**20:,.0f} MiB",
        f"{100 * share:.0f} %",
        "yes" if share <= 1 else "**no**",
        f"{c['compile_seconds']:.0f} s",
        _estimate(c),
        _ms(c["floor_seconds"]),
    )
    return head + "| " + " | ".join(cells) + " |"


def _step_row(outcome: dict[str, Any]) -> str:
    head = f"| {outcome['accelerator']} | {outcome['program']} "
    if (c := outcome["compiled"]) is None:
        return f"{head}| {outcome['error']} |" + " |" * 10
    memory = ACCELERATORS[outcome["accelerator"].removesuffix(ONE_CHIP)].memory
    ratio = "-"
    if c["accessed_bytes"] and c["weight_bytes"]:
        ratio = f"{c['accessed_bytes'] / c['least_bytes']:.2f}"
    hbm = f"{c['hbm_bytes'] / c['least_bytes']:.2f}" if c.get("hbm_bytes") else "-"
    cells = (
        f"{_gib(c['weight_bytes'])} GiB",
        f"{_gib(c['pool_bytes'])} GiB",
        f"{c['temp_bytes'] / 2**20:,.0f} MiB",
        f"{100 * c['total_bytes'] / memory:.0f} %",
        "yes" if c["pool_in_place"] else "**no**",
        f"{c['largest_pool_tokens']:,}",
        hbm,
        ratio,
        f"{c['compile_seconds']:.0f} s",
        _estimate(c),
        _ms(c["floor_seconds"]),
    )
    return head + "| " + " | ".join(cells) + " |"


def _kernel_row(program: str, kernels: list[dict[str, Any]]) -> str:
    cells = []
    for accelerator in ACCELERATORS:
        found = [o for o in kernels if o["program"] == program and o["accelerator"] == accelerator]
        if not found:
            cells.append("not compiled")
        elif (compiled := found[0]["compiled"]) is None:
            cells.append(found[0]["error"])
        else:
            place = "" if compiled["pool_in_place"] else ", copies the pool"
            cells.append(f"{compiled['compile_seconds']:.1f}{place}")
    return f"| {program} | " + " | ".join(cells) + " |"


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f}"


def _estimate(compiled: dict[str, Any]) -> str:
    seconds = compiled["estimated_seconds"]
    if seconds is not None:
        return _ms(seconds)
    return f"none: {compiled.get('no_estimate', 'unusable, kept from a run without the reason')}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"


def _versions() -> str:
    found = []
    for package in _COMPILERS:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)
