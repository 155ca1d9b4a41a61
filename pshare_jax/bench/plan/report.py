"""The tables of `bench plan`: Markdown, for the terminal and for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_LABEL = "**Predicted, not measured.**"


def sections(result: dict[str, Any]) -> dict[str, str]:
    """Markdown by the name of its place in a document: `validation`, `plan`, or both."""
    found = {}
    if result["validation"]:
        parts = ["### Predicted against measured\n", *_validation(result), ""]
        found["validation"] = "\n".join(parts)
    if predictions := result["predictions"]:
        parts = ["### Predictions\n", _assumptions(result["options"]["predict"], predictions), ""]
        parts += ["#### Memory\n", _MEMORY, *_memory(result["memory"]), ""]
        parts += ["#### Sharing against not sharing\n", _GAINS, *_gains(predictions), ""]
        parts += ["#### The split\n", _SPLITS, *_splits(predictions), ""]
        parts += ["#### Load\n", _LOAD, *_load(predictions), ""]
        found["plan"] = "\n".join(parts)
    return found


def worst(rows: Sequence[dict[str, Any]], figure: str) -> float:
    """The largest relative error of a figure, without its sign."""
    return max(abs(row["error"][figure]) for row in rows)


def _table(headers: Sequence[str], rows: Iterator[Sequence[str]], words: int) -> list[str]:
    """Markdown lines; the first `words` columns are words, the others numbers."""
    rule = "|".join(["---"] * words + ["--:"] * (len(headers) - words))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return ["| " + " | ".join(headers) + " |", f"|{rule}|", *lines]


def _validation(result: dict[str, Any]) -> list[str]:
    rows = result["validation"]
    headers = ["server", "models", "live sessions"]
    for name in ("tok/s", "call p95, s", "TTFT p95, s"):
        headers += [f"{name} predicted", "measured", "error"]

    def cells(row: dict[str, Any]) -> list[str]:
        found = [row["target"], str(row["models"]), str(row["concurrency"])]
        for name, text in (
            ("generated_tokens_per_s", ",.1f"),
            ("call_p95_s", ",.3f"),
            ("ttft_p95_s", ",.3f"),
        ):
            found += [format(row[side][name], text) for side in ("predicted", "measured")]
            found.append(f"{row['error'][name]:+.0%}")
        return found

    lines = _table(headers, map(cells, rows), 1)
    lines += [
        "",
        f"Largest error: {worst(rows, 'generated_tokens_per_s'):.0%} of throughput, "
        f"{worst(rows, 'call_p95_s'):.0%} of the p95 of calls.",
    ]
    lines += [
        f"Shared over isolated with {row['models']} models, each at its best: predicted "
        f"{row['predicted']:.2f}, measured {row['measured']:.2f} ({row['error']:+.0%})."
        for row in result["validation_ratios"]
    ]
    return lines


def _assumptions(options: dict[str, Any], predictions: Sequence[dict[str, Any]]) -> str:
    shape, reached, engines = options["workload"], options["efficiency"], options["engines"]
    extra = {case["machine"]: f"{case['extra_bytes']:.3g}" for case in predictions}
    extras = ", ".join(f"{times} on {name}" for name, times in extra.items())
    return f"""\
{_LABEL} {options["model"]} in bfloat16. Sessions of {shape["models"] * shape["turns"]} calls,
`{shape["pattern"]}`: {shape["prompt"]} tokens of context, {shape["generated"]} generated and
{shape["observed"]} observed a call. Costs are rooflines of the machines in
[accelerators.md](accelerators.md). Assumed, not measured:

- {reached["compute"]:.0%} of the peak, {reached["bandwidth"]:.0%} of the memory's bandwidth and
  {reached["link"]:.0%} of the links';
- {1000 * reached["launch_seconds"]:g} ms of the host for each step, and
  {1e6 * reached["collective_seconds"]:g} us for each of two collectives a layer on a mesh;
- decode steps access the least bytes times: {extras};
- {engines["reserve"]:.0%} of memory is left free; LoRA modules are of rank
  {engines["lora_rank"]} on all projections; HTTP and sampling are left out."""


_MEMORY = f"""\
{_LABEL} By the size of a tensor parallel mesh: how much of its memory one full
module takes, tokens of KV beside a prefill module, the most full decode modules that leave room for
KV, and KV beside LoRA modules. Room is what holds the least number of sequences of full length
(`engines.least_sequences`).
"""
_GAINS = f"""\
{_LABEL} Both sides in their best layout, at the live sessions where each has most
throughput; p95 at the most live sessions. Full modules that do not share have devices of their own
for each model, which prefill and decode apart or not, whichever is better. LoRA modules that do not
share lie on the same engines as those that do, with a KV cache for each model. G_max is from the
device seconds of prefill and decode of the best shared run; more is possible only where the other
side's caches forget, where its devices have unequal work or its batches are smaller. Balance:
devices of the machine at which prefill and decode would be equally busy; the more it lies below
half, the more decode is the limit.
"""
_SPLITS = f"""\
{_LABEL} Models that share, at the most live sessions; of each split the fitting
layout with the highest closed-form bound. Busy: share of the time in which the engines compute.
"""
_LOAD = f"{_LABEL} The best layouts over live sessions.\n"


def _memory(rows: Sequence[dict[str, Any]]) -> list[str]:
    headers = ["machine", "mesh", "one module", "prefill: KV tokens", "most full modules"]
    headers += ["decode: KV tokens beside them", "decode: KV tokens beside LoRA modules"]

    def cells(row: dict[str, Any]) -> list[str]:
        return [
            row["machine"],
            str(row["mesh"]),
            f"{row['weights']:.0%}",
            _tokens(row["prefill_tokens"]),
            str(row["most_modules"]),
            _tokens(row["most_modules_tokens"]),
            f"{_tokens(row['lora_tokens'])} ({row['lora_modules']} modules)",
        ]

    return _table(headers, map(cells, rows), 1)


def _tokens(count: int) -> str:
    return f"{count:,}" if count else "does not fit"


def _gains(predictions: Sequence[dict[str, Any]]) -> list[str]:
    headers = ["machine", "models", "modules", "best split", "tok/s shared", "isolated", "gain"]
    headers += ["rho", "G_max", "gain / G_max", "call p95 shared, s", "isolated", "balance"]

    def cells(case: dict[str, Any]) -> list[str]:
        head = [case["machine"], str(case["models"]), case["modules"]]
        if "best" not in case:
            return [*head, "does not fit", *["-"] * 9]
        best, other, limit = case["best"], case.get("isolated"), case["limit"]
        return [
            *head,
            f"{best['split']}, {best['layout']}",
            f"{_top(case['curve']):,.0f}",
            "does not fit" if other is None else f"{_top(case['isolated_curve']):,.0f}",
            _times(limit["gain"]),
            f"{limit['rho']:.2f}",
            f"{limit['g_max']:.2f}",
            "-" if limit["gain"] is None else f"{limit['gain_of_g_max']:.2f}",
            f"{best['call_s']['p95']:.2f}",
            "-" if other is None else f"{other['call_s']['p95']:.2f}",
            f"{limit['balanced_prefill_devices']:.1f}",
        ]

    return _table(headers, map(cells, predictions), 4)


def _splits(predictions: Sequence[dict[str, Any]]) -> list[str]:
    headers = ["machine", "models", "modules", "split", "layout", "tok/s", "TTFT p95, s"]
    headers += ["call p95, s", "prefill busy", "decode busy", "limit", "sequences a step", "cached"]

    def rows() -> Iterator[list[str]]:
        for case in predictions:
            for row in case["splits"]:
                yield [
                    case["machine"],
                    str(case["models"]),
                    case["modules"],
                    row["split"],
                    row["layout"],
                    f"{row['generated_tokens_per_s']:,.0f}",
                    f"{row['ttft_s']['p95']:.2f}",
                    f"{row['call_s']['p95']:.2f}",
                    f"{row['prefill_busy']:.0%}",
                    f"{row['decode_busy']:.0%}",
                    row["limit"],
                    f"{row['sequences_per_step']:.1f}",
                    f"{row['cached']:.0%}",
                ]

    return _table(headers, rows(), 5)


def _load(predictions: Sequence[dict[str, Any]]) -> list[str]:
    headers = ["machine", "models", "modules", "mode", "live sessions", "tok/s", "TTFT p95, s"]
    headers += ["call p50, s", "call p95, s", "cached"]

    def rows() -> Iterator[list[str]]:
        for case in predictions:
            for mode, curve in (("shared", "curve"), ("isolated", "isolated_curve")):
                for row in case.get(curve, ()):
                    yield [
                        case["machine"],
                        str(case["models"]),
                        case["modules"],
                        mode,
                        str(row["concurrency"]),
                        f"{row['generated_tokens_per_s']:,.0f}",
                        f"{row['ttft_s']['p95']:.2f}",
                        f"{row['call_s']['p50']:.2f}",
                        f"{row['call_s']['p95']:.2f}",
                        f"{row['cached']:.0%}",
                    ]

    return _table(headers, rows(), 4)


def _top(curve: Sequence[dict[str, Any]]) -> float:
    return max(row["generated_tokens_per_s"] for row in curve)


def _times(gain: float | None) -> str:
    return "-" if gain is None else f"{gain:.2f}x"
