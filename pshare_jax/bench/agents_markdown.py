"""Results of `bench agents` as Markdown, for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pshare_jax.bench import machine
from pshare_jax.bench.agents_report import columns, groups, times

_NAMES = {
    "vllm": "vLLM, a process for each model",
    "vllm, LoRA": "vLLM, one process with adapters",
    "llama.cpp": "llama.cpp, a process for each model",
    "servers": "other servers",
}


def markdown(result: dict[str, Any], title: str, plots: Sequence[Path] = ()) -> str:
    """What was played, medians of each server, ratios, limits, plots and the machine.

    Args:
        result: of `agents.run`, with its `machine`.
        title: the heading.
        plots: files to show, as the document names them.
    """
    parts = [f"### {title}", _setting(result), "\n".join(_runs(result))]
    if result["comparisons"]:
        parts += [_RATIOS, "\n".join(_ratios(result["comparisons"]))]
    if result["limits"]:
        parts += [_LIMITS, "\n".join(_limits(result["limits"]))]
    parts += [f"![{title}]({plot})" for plot in plots]
    return "\n\n".join([*parts, f"{machine.one_line(result['machine'])}{_peers(result)}."]) + "\n"


_RATIOS = """\
Ratios, above 1 in favour of the first-named server; median (lowest - highest) over the rounds. For
latencies: how many times lower it is."""
_LIMITS = """\
Measured prefill and decode seconds of a session, and how much of the most that sharing can give was
reached."""


def _setting(result: dict[str, Any]) -> str:
    options = result["options"]
    shape = options["workload"]
    arrivals = (
        f"that arrive at {options['rate']:g} a second"
        if options["rate"]
        else "each of which starts when another ends"
    )
    fewest, most = (f(run["sessions"] for run in result["runs"]) for f in (min, max))
    sessions = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return (
        f"`{shape['pattern']}`: {shape['models'] * shape['turns']} calls a session, "
        f"{shape['prompt']:,} tokens of context, {shape['generated']} generated and "
        f"{shape['observed']} observed a call; {sessions} sessions {arrivals}. Medians "
        f"of {options['rounds']} interleaved rounds."
    )


def _runs(result: dict[str, Any]) -> Iterator[str]:
    cells = columns()
    yield "| server | models | live sessions | " + " | ".join(name for name, _ in cells) + " |"
    yield "|---|--:|--:|" + "--:|" * len(cells)
    for target, models, concurrency, runs in groups(result):
        figures = " | ".join(cell(runs) for _, cell in cells)
        yield f"| {_NAMES.get(target, target)} | {models} | {concurrency} | {figures} |"


def _ratios(comparisons: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "| | models | live sessions | tok/s | call p95 | session p95 | TTFT p95 |"
    yield "|---|--:|---|--:|--:|--:|--:|"
    for row in comparisons:
        pair = f"{row['target']} : {row['baseline']}"
        rows = [(f"{c} : {c}", found) for c, found in row["equal_concurrency"].items()]
        best = row["best"]
        sides = best["concurrency"]
        if len(rows) > 1:
            rows.append((f"best: {sides[row['target']]} : {sides[row['baseline']]}", best))
        for live, found in rows:
            kinds = ("throughput", "p95_call_s", "p95_session_s", "p95_ttft_s")
            figures = " | ".join(times(found[kind]) for kind in kinds)
            yield f"| {pair} | {row['models']} | {live} | {figures} |"


def _limits(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "| models | prefill, s | decode, s | rho | G_max | achieved | of G_max |"
    yield "|--:|--:|--:|--:|--:|--:|--:|"
    for row in rows:
        yield (
            f"| {row['models']} | {row['prefill_s']:.3f} | {row['decode_s']:.3f} | "
            f"{row['rho']:.2f} | {row['g_max']:.2f} | {row['achieved']:.2f} | "
            f"{row['achieved_of_g_max']:.0%} |"
        )


def _peers(result: dict[str, Any]) -> str:
    versions = {
        f", vLLM {target['version']['version']}"
        for target in result["targets"]
        if target["name"] in ("vllm", "vllm, LoRA") and target["version"]
    }
    return "".join(sorted(versions))
