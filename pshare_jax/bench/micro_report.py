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
    options, peers = result["options"], []
    weights = "" if options["weights"] == "plain" else f", weights {options['weights']}"
    kind = f"{result['dtype']}{weights}, {result['backend']}"
    table = Table(title=f"{options['base']}, {kind}: tokens/s")
    headers = ["median", "slowest", "fastest"]
    if (vllm := result.get("vllm")) is not None:
        headers += [f"vLLM {vllm['packages']['vllm']}, median", "ratio", "lowest", "highest"]
        peers.append(vllm)
    if (beside := result.get("beside")) is not None:
        headers += [f"weights {beside['weights']}, median", "ratio", "lowest", "highest"]
        peers.append(beside)
    table.add_column("")
    for header in headers:
        table.add_column(header, justify="right")
    for length, rate in result["prefill"].items():
        found = [(peer["prefill"][length], peer["ratios"]["prefill"][length]) for peer in peers]
        table.add_row(f"prefill, {length} tokens", *_cells(rate, found))
    for context, rates in result["decode"].items():
        for batch, rate in rates.items():
            found = [
                (peer["decode"][context][batch], peer["ratios"]["decode"][context][batch])
                for peer in peers
            ]
            name = f"decode, batch {batch}, {context} tokens of context"
            table.add_row(name, *_cells(rate, found))
    for rows, rate in result["lora"].items():
        table.add_row(f"decode, {LORA_ROWS} rows of {rows} (LoRA)", *_cells(rate, []))
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
    rate: dict[str, float], peers: list[tuple[dict[str, float], dict[str, float]]]
) -> list[str]:
    cells = [f"{rate[key]:,.1f}" for key in ("median", "low", "high")]
    for theirs, ratio in peers:
        cells += [f"{theirs['median']:,.1f}"]
        cells += [f"{ratio[key]:.2f}" for key in ("median", "low", "high")]
    return cells
