"""Costs of steps from results of `bench micro`: one line for each compiled size."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from pshare_jax.bench.plan.costs import Line, TableCosts
from pshare_jax.errors import ConfigError

Points = Mapping[int, Sequence[tuple[float, float, float]]]
"""Compiled size to measurements: times its base counts, times its slope counts, seconds."""

_LORA_MODULES, _LORA_ROWS = "several modules", 8
"""The measurement of LoRA modules that `bench micro` makes, and its rows."""

_WITHOUT_PADDING = {"cpu_ffi"}
"""Kernel backends that compute the tokens of a chunk or batch and not its padding."""


def read_results(files: Sequence[str]) -> list[dict[str, Any]]:
    """Result files of `bench micro`.

    Raises:
        ConfigError: none is named, or one cannot be read or is something else.
    """
    if not files:
        raise ConfigError("micro: name result files of `bench micro --json`")
    results = []
    for file in files:
        try:
            result = json.loads(Path(file).read_text())
            known = {"options", "prefill", "decode"} <= result.keys()
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"micro: {file} cannot be read: {error}") from error
        if not known:
            raise ConfigError(f"micro: {file} is no result of `bench micro`")
        results.append(result)
    return results


def table_costs(
    results: Sequence[dict[str, Any]], rate: str = "median", lora: bool = False
) -> TableCosts:
    """Costs for a server on the machine where the results were measured.

    A decode step of a batch takes `a + b * (tokens of KV that its rows read)`, which two contexts
    settle. A prefill takes one decode step and its chunks; a chunk `c + d * (tokens that each of
    its tokens sees, in the mean)`, which two lengths settle. The handoff is part of `c`.

    Args:
        results: of `bench micro`, with at least two contexts; with several sizes of `chunk` those
            are used, between them straight lines.
        rate: which rate of the repeats counts, `median` or `high`.
        lora: whether rows are of LoRA modules: steps then take as much longer than those of a full
            module as `--lora_rank` of `bench micro` has found.

    Raises:
        ConfigError: too little was measured.
    """
    steps = _fit(_step_points(results, rate, lora), "decode", "contexts", least=2)
    if 1 not in steps:
        raise ConfigError("micro: no result has decode rates of batch 1")
    chunks = _fit(_chunk_points(results, rate, steps), "prefill", "lengths", least=2)
    # A chunk of one token reads what a step reads.
    padded = _backend(results) not in _WITHOUT_PADDING
    return TableCosts({1: steps[1], **chunks}, steps, padded=padded)


def _backend(results: Sequence[dict[str, Any]]) -> str:
    backends = {result.get("backend", "xla") for result in results}
    if len(backends) > 1:
        raise ConfigError(f"micro: results of several kernel backends: {sorted(backends)}")
    return backends.pop()


def _step_points(results: Sequence[dict[str, Any]], rate: str, lora: bool) -> Points:
    points = defaultdict(list)
    slower = _lora_factor(results, rate) if lora else 1.0
    for result in results:
        options = result["options"]
        for context, rates in _decode_rates(result).items():
            # While the windows are measured the contexts grow.
            reached = context + options["window"] * options["repeats"] / 2
            for batch, found in rates.items():
                points[batch].append((1.0, batch * reached, slower * batch / found[rate]))
    return points


def _decode_rates(result: dict[str, Any]) -> dict[int, dict[int, dict[str, float]]]:
    """Context to batch to tokens/s: several contexts a result, or one where it is named alone."""
    found, options = result["decode"], result["options"]
    by_context = found if "contexts" in options else {options["context"]: found}
    return {
        int(context): {int(batch): rate for batch, rate in rates.items()}
        for context, rates in by_context.items()
    }


def _lora_factor(results: Sequence[dict[str, Any]], rate: str) -> float:
    """What rows of several LoRA modules take, over as many rows of one full module."""
    factors = [
        _decode_rates(result)[result["options"]["contexts"][0]][_LORA_ROWS][rate]
        / result["lora"][_LORA_MODULES][rate]
        for result in results
        if result.get("lora")
    ]
    if not factors:
        raise ConfigError("micro: the models are LoRA modules; measure some with --lora_rank")
    return statistics.median(factors)


def _chunk_points(
    results: Sequence[dict[str, Any]], rate: str, steps: Mapping[int, Line]
) -> Points:
    points = defaultdict(list)
    for result in results:
        bucket, page_size = result["options"]["chunk"], result["options"]["page_size"]
        for length, found in result["prefill"].items():
            cover, start, count, seen = int(length) - 1, 0, 0.0, 0.0
            while start < cover:
                end = start + bucket
                end = cover if end >= cover else end - end % page_size
                count += 1
                seen += start + (end - start + 1) / 2
                start = end
            seconds = int(length) / found[rate] - steps[1](int(length))
            points[bucket].append((count, seen, max(seconds, 0.0)))
    return points


def _fit(points: Points, what: str, name: str, least: int) -> dict[int, Line]:
    """Least squares of relative errors, nothing below zero."""
    lines = {}
    for size, rows in points.items():
        if len({slope / base for base, slope, _ in rows}) < least:
            raise ConfigError(f"micro: {what} of size {size} needs at least {least} {name}")
        table = np.array(rows)
        weights = 1 / np.maximum(table[:, 2], 1e-9)
        scale = table[:, 1].max()
        matrix = table[:, :2] * weights[:, None] / np.array([1.0, scale])
        (base, slope), _ = nnls(matrix, np.ones(len(rows)))
        lines[size] = Line(float(base), float(slope / scale))
    return dict(sorted(lines.items()))
