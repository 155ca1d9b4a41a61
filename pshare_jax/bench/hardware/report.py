"""The result of `bench hardware` as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pshare_jax.bench.hardware.parts import OK, PARTS
from pshare_jax.bench.machine import one_line

Figures = dict[str, Any]


def document(result: dict[str, Any]) -> str:
    """The tables, and the machine below them."""
    return "\n".join([*lines(result), "", one_line(result["machine"]), ""])


def lines(result: dict[str, Any]) -> list[str]:
    """The device, then a table for each part."""
    device = result["device"]
    memory = device["memory_bytes"]
    parts = [
        f"## {device['kind']}",
        "",
        f"{device['count']} x {device['kind']} ({device['platform']}), "
        f"{'memory not known' if memory is None else f'{memory / 2**30:.0f} GiB for JAX'}, "
        f"jax {device['jax']}.",
    ]
    if device["bandwidth"]:
        parts[-1] += (
            f" Published: {device['bandwidth'] / 1e9:,.0f} GB/s, "
            f"{device['peak'] / 1e12:,.0f} TFLOP/s in bfloat16."
        )
    if result["scale"] == "tiny":
        parts += ["", "Tiny sizes: these figures say that it runs, and nothing of speed."]
    for name, part in result["parts"].items():
        parts += ["", f"### {PARTS[name].title}", ""]
        if part["status"] != OK:
            parts += [f"{part['status']}: {part['error']}", ""]
        parts += _BODIES[name](part["figures"], device)
    return parts


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    heads = list(heads)
    return [
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _rates(rates: list[Figures], device: Figures) -> list[str]:
    rows = []
    for rate in rates:
        if "error" in rate:
            rows.append((rate["what"], rate["backend"], "-", "-", "-", rate["error"]))
            continue
        of = None
        if rate["gb_s"] and device["bandwidth"]:
            of = rate["gb_s"] * 1e9 / device["bandwidth"]
        elif rate["tflop_s"] and device["peak"]:
            of = rate["tflop_s"] * 1e12 / device["peak"]
        cells = (_number(rate["us"]), _number(rate["gb_s"]), _number(rate["tflop_s"], 2))
        rows.append((rate["what"], rate["backend"], *cells, _share(of)))
    return _table(("what", "by", "us", "GB/s", "TFLOP/s", "of published"), rows)


def _kernels(figures: Figures, device: Figures) -> list[str]:
    shown = []
    if "correct" in figures:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in figures["correct"].items())
        shown += [f"Largest relative error against float64: {errors}.", ""]
    if "copy_gb_s" in figures:
        shown += [f"Adding 1 to an array: {figures['copy_gb_s']:,.0f} GB/s.", ""]
    return shown + (_rates(figures["rates"], device) if "rates" in figures else [])


def _torch(figures: Figures, device: Figures) -> list[str]:
    if "rates" not in figures:
        return []
    return [f"PyTorch {figures['torch']}.", "", *_rates(figures["rates"], device)]


def _handoff(figures: Figures, _: Figures) -> list[str]:
    if "gb_s" not in figures:
        return []
    rows = [(name, _number(rate)) for name, rate in figures["gb_s"].items()]
    return [f"{figures['bytes'] / 1e6:,.1f} MB at once.", "", *_table(("step", "GB/s"), rows)]


def _codec(figures: Figures, _: Figures) -> list[str]:
    rows = []
    for name, found in figures.items():
        for where in ("host", "device"):
            rates = found[where]
            cells = [_number(rates.get(kind)) for kind in ("encode", "decode")]
            note = rates.get("error", rates.get("backend", "xla"))
            rows.append((name, _number(found["ratio"], 3), where, *cells, note))
    heads = ("codec", "ratio", "where", "encode, GB/s", "decode, GB/s", "by")
    return _table(heads, rows) if rows else []


def _serving(figures: Figures, _: Figures) -> list[str]:
    if "prefill" not in figures:
        return []
    prefill = figures["prefill"]
    shown = [
        f"Weights: {figures['weight_bytes'] / 1e9:,.2f} GB. Prefill of {prefill['tokens']:,} "
        f"tokens: {prefill['tok_s']:,.0f} tokens/s, {prefill['tflop_s']:,.2f} TFLOP/s, "
        f"{_share(prefill['of_peak'])} of the peak.",
        "",
    ]
    rows = [
        (
            f"{row['rows']} rows{', one context' if row['shared'] else ''}",
            f"{row['context']:,}",
            _number(row["tok_s"], 0),
            _number(row["step_ms"], 2),
            _number(row["least_bytes"] / 1e9, 2),
            _number(row["gb_s"]),
            _share(row["of_bandwidth"]),
        )
        for row in figures.get("decode", ())
    ]
    heads = ("decode", "context", "tokens/s", "step, ms", "least GB", "GB/s", "of bandwidth")
    shown += _table(heads, rows)
    if "shared_gain" in figures:
        gain = f"{figures['shared_gain']:.2f} times the tokens/s of contexts of their own"
        shown += ["", f"Rows over one context: {gain}. Compiles: {figures['compiles']}."]
    return shown


def _agents(figures: Figures, _: Figures) -> list[str]:
    rows = [
        (
            name,
            _number(figures[name]["calls_s"], 2),
            _number(figures[name]["ttft_p50"], 3),
            _number(figures[name]["ttft_p95"], 3),
            f"{figures[name]['computed_tokens']:,}",
        )
        for name in ("shared", "isolated")
        if name in figures
    ]
    heads = ("KV", "calls/s", "first token p50, s", "p95, s", "prompt tokens computed")
    shown = _table(heads, rows) if rows else []
    if "gain" in figures:
        more = f"{figures['most']:.2f} times fewer prompt tokens computed"
        shown += ["", f"Sharing: {figures['gain']:.2f} times the calls a second; {more}."]
    return shown


_BODIES: dict[str, Callable[[Figures, Figures], list[str]]] = {
    "kernels": _kernels,
    "torch": _torch,
    "handoff": _handoff,
    "codec": _codec,
    "serve-1b": _serving,
    "serve-8b": _serving,
    "agents": _agents,
}
