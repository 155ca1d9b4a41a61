"""`bench compile`: what reading shared pages once saves of a decode step's KV traffic.

The bytes of pages follow from page tables, counted by the very function that the engine groups its
rows with. What the two passes and the merge move besides (queries, unfinished softmaxes) is counted
from the compiled attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pshare_jax.bench.accelerators import ACCELERATORS, Accelerator
from pshare_jax.bench.agents_plots import check_installed
from pshare_jax.bench.compile_kernels import KernelCase
from pshare_jax.bench.compile_models import MODELS
from pshare_jax.bench.compile_programs import DTYPE
from pshare_jax.bench.hbm_traffic import hbm_bytes
from pshare_jax.bench.shared_prefix_programs import attention_program
from pshare_jax.core.shared_runs import max_groups, shared_runs
from pshare_jax.models.config import ModelConfig
from pshare_jax.runtime.layout import PageLayout

SHARERS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class SharedPrefixOptions:
    """The batches that are looked at: all rows share one prompt.

    Args:
        model: name of the model.
        contexts: tokens of the shared prompt.
        own: tokens of each row besides: the end of its prompt and what it has generated.
        page_size: token slots of a page.
    """

    model: str = "Llama-3.1-8B"
    contexts: list[int] = field(default_factory=lambda: [2048, 8192])
    own: int = 256
    page_size: int = 32


@dataclass(frozen=True)
class SharedPrefixRow:
    """One batch; bytes of KV pages that one decode step of the whole model reads."""

    context: int
    sharers: int
    plain_bytes: int
    shared_bytes: int


def page_bytes(options: SharedPrefixOptions, config: ModelConfig) -> Iterator[SharedPrefixRow]:
    """Page traffic row by row, and with each run read once, from page tables."""
    layout = PageLayout.of(config, options.page_size, DTYPE)
    for context in options.contexts:
        shared = context // options.page_size
        own = layout.pages_for(context + options.own) - shared
        for sharers in SHARERS:
            table = np.zeros((sharers, shared + own), np.int32)
            table[:, :shared] = 1 + np.arange(shared)
            table[:, shared:] = 1 + shared + np.arange(sharers * own).reshape(sharers, own)
            positions = [context + options.own - 1] * sharers
            runs = shared_runs(table, positions, options.page_size, max_groups(sharers))
            plain = runs.plain_pages * layout.bytes_per_page
            saved = runs.saved_pages * layout.bytes_per_page
            yield SharedPrefixRow(context, sharers, plain, plain - saved)


def bytes_besides_pages(
    accelerator: Accelerator, config: ModelConfig, sharers: int, page_size: int, *, shared: bool
) -> float:
    """What attention of one step moves to and from memory besides pages, by the compiled program.

    Of all layers, on all devices of the decode mesh; see `hbm_traffic`.
    """
    degree = accelerator.decode
    heads, kv_heads = config.num_heads // degree, max(config.num_kv_heads // degree, 1)
    case = KernelCase(sharers, 1, heads, kv_heads, config.head_dim, page_size)
    program = attention_program(accelerator, case, 2048, shared=shared)
    hlo = program.function.lower(*program.arguments).compile().as_text()
    return hbm_bytes(hlo, program.pool_bytes) * config.num_layers * degree


def run(options: SharedPrefixOptions, names: list[str]) -> dict[str, Any]:
    """The figures of the table as plain data.

    Args:
        options: the batches.
        names: machines to compile for.
    """
    config = MODELS[options.model]
    besides = {
        name: [
            [
                bytes_besides_pages(
                    ACCELERATORS[name], config, sharers, options.page_size, shared=shared
                )
                for shared in (False, True)
            ]
            for sharers in SHARERS[1:]
        ]
        for name in names
    }
    rows = [vars(row) for row in page_bytes(options, config)]
    return {"model": options.model, "own": options.own, "rows": rows, "besides": besides}


def markdown(result: dict[str, Any]) -> list[str]:
    """The section of docs/accelerators.md."""
    machines = list(result["besides"])
    heads = "".join(f" | besides, {name}: plain, shared" for name in machines)
    parts = [
        "## Shared-prefix decode\n",
        f"KV that one decode step of {result['model']} reads when all rows of a batch share a "
        f"prompt and have\n{result['own']} tokens of their own: page by page for each row, or with "
        "the shared pages read once.\n",
        "- **Read** counts pages, from page tables, by the function that groups the engine's rows.",
        "- **Besides** is what attention moves to and from memory that is no page (queries, "
        "unfinished\n  softmaxes, the merge, new K and V), counted from the compiled programs.",
        "- **Saved** is of pages alone. A run is read once on a TPU; on a GPU once a tile of "
        "64\n  rows (member, head of a group), the later ones mostly from L2.\n",
        "Drawn by `--plot FILE.png`.\n",
        f"| shared tokens | sharers | read, row by row | read, shared once | saved{heads} |",
        "|--:|--:|--:|--:|--:|" + "--:|" * len(machines),
    ]
    for row in result["rows"]:
        cells = [
            f"{row['context']:,}",
            str(row["sharers"]),
            f"{row['plain_bytes'] / 1e9:.2f} GB",
            f"{row['shared_bytes'] / 1e9:.2f} GB",
            f"{100 * saved_share(row):.0f} %",
        ]
        for name in machines:
            index = SHARERS.index(row["sharers"]) - 1
            pair = result["besides"][name][index] if index >= 0 else []
            cells.append(" / ".join(f"{x / 1e6:.0f} MB" for x in pair) or "-")
        parts.append("| " + " | ".join(cells) + " |")
    return [*parts, ""]


def saved_share(row: dict[str, Any]) -> float:
    """Share of the page bytes that a row of the result saves."""
    return 1 - row["shared_bytes"] / row["plain_bytes"]


def draw(result: dict[str, Any], file: Path) -> None:
    """Writes a plot: share of the KV bytes saved over the number of sharers, a line a context.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    check_installed()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for context in dict.fromkeys(row["context"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["context"] == context]
        axes.plot(
            [row["sharers"] for row in rows],
            [100 * saved_share(row) for row in rows],
            marker="o",
            label=f"{context:,} shared tokens",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(SHARERS, [str(n) for n in SHARERS])
    axes.set_ylim(0, 100)
    axes.set_xlabel("sequences that share the prompt")
    axes.set_ylabel("KV bytes saved, %")
    axes.set_title(f"{result['model']}, {result['own']} tokens of each row's own")
    axes.legend()
    figure.savefig(file)
