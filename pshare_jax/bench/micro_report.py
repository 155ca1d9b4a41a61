"""Results of `bench micro` as tables."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from pshare_jax.bench.micro import LORA_ROWS

# Of what a table of profiles shows.
_LEAST_SHARE = 0.01


def tables(result: dict[str, Any]) -> list[Table]:
    """Rates, and what the time went to where that was traced.

    Args:
        result: of `micro.run`.
    """
    options, vllm = result["options"], result.get("vllm")
    table = Table(title=f"{options['base']}, {result['dtype']}, {result['backend']}: tokens/s")
    headers = ["median", "slowest", "fastest"]
    if vllm:
        headers += [f"vLLM {vllm['packages']['vllm']}, median", "ratio", "lowest", "highest"]
    table.add_column("")
    for header in headers:
        table.add_column(header, justify="right")
    for length, rate in result["prefill"].items():
        peer = vllm and (vllm["prefill"][length], vllm["ratios"]["prefill"][length])
        table.add_row(f"prefill, {length} tokens", *_cells(rate, peer))
    for context, rates in result["decode"].items():
        for batch, rate in rates.items():
            peer = vllm and tuple(
                figures["decode"][context][batch] for figures in (vllm, vllm["ratios"])
            )
            name = f"decode, batch {batch}, {context} tokens of context"
            table.add_row(name, *_cells(rate, peer))
    for rows, rate in result["lora"].items():
        table.add_row(f"decode, {LORA_ROWS} rows of {rows} (LoRA)", *_cells(rate, None))
    return [table, _profiles_table(result["profiles"])] if result["profiles"] else [table]


def _profiles_table(profiles: dict[str, Any]) -> Table:
    table = Table(title="shares of the traced time, and of the time of each program's operations")
    for header in ("", "s", "idle", "program", "share", "operations"):
        table.add_column(header, justify="right" if header in ("s", "idle", "share") else "left")
    for name, profile in profiles.items():
        cells = [name, f"{profile['seconds']:.3f}", f"{profile['idle']:.1%}"]
        for program, found in profile["programs"].items():
            if found["share"] < _LEAST_SHARE:
                continue
            kinds = [
                f"{kind} {share:.1%}"
                for kind, share in found["operations"].items()
                if share >= _LEAST_SHARE
            ]
            table.add_row(*cells, program, f"{found['share']:.1%}", ", ".join(kinds))
            cells = ["", "", ""]
    return table


def _cells(
    rate: dict[str, float], peer: tuple[dict[str, float], dict[str, float]] | None
) -> list[str]:
    cells = [f"{rate[key]:,.1f}" for key in ("median", "low", "high")]
    if peer:
        theirs, ratio = peer
        cells += [f"{theirs['median']:,.1f}"]
        cells += [f"{ratio[key]:.2f}" for key in ("median", "low", "high")]
    return cells
