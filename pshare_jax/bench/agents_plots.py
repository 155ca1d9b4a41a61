"""The plots of `bench agents`, from its result file; matplotlib comes with the `bench` extra."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pshare_jax.bench.agents_compare import Run, best_concurrency, p95, select, throughput
from pshare_jax.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = list[tuple[int, list[float]]]
Value = Callable[[Run], float]
_PANELS: tuple[tuple[str, Value], ...] = (
    ("generated tokens/s", throughput),
    ("p95 call latency, s", p95("call_s")),
)


def check_installed() -> None:
    """Raises ConfigError if matplotlib is missing; asked before hours are spent on measuring."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError("plots: needs matplotlib; pip install 'pshare_jax[bench]'") from error


def draw(result: dict[str, Any], folder: Path, prefix: str = "") -> list[Path]:
    """Writes `concurrency.png` and, if several numbers of models were run, `models.png`.

    Each has throughput and p95 call latency, a line a target: medians of the rounds, and bars from
    the lowest to the highest. Over the models, each target is at its best concurrency.

    Args:
        result: of `agents.run`.
        folder: made if need be.
        prefix: of the files' names.

    Returns:
        The files.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    check_installed()
    folder.mkdir(parents=True, exist_ok=True)
    runs = result["runs"]
    targets = [target["name"] for target in result["targets"]]
    counts = sorted({run["models"] for run in runs})
    workload = result["options"]["workload"]
    title = (
        f"{workload['pattern']}: {workload['prompt']} tokens of context, {workload['generated']} "
        f"generated and {workload['observed']} observed a call"
    )
    files = [folder / f"{prefix}concurrency.png"]
    lines = {
        f"{target}, {count} models": by_concurrency(runs, target, count)
        for count in counts
        for target in targets
    }
    _figure(files[0], title, "live sessions", lines)
    if len(counts) > 1:
        files.append(folder / f"{prefix}models.png")
        lines = {target: by_models(runs, target) for target in targets}
        _figure(files[1], title, "models", lines)
    return files


def by_concurrency(runs: Sequence[Run], target: str, models: int) -> list[tuple[int, list[Run]]]:
    """The runs of each concurrency, all rounds."""
    mine = select(runs, target=target, models=models)
    return [(c, select(mine, concurrency=c)) for c in sorted({run["concurrency"] for run in mine})]


def by_models(runs: Sequence[Run], target: str) -> list[tuple[int, list[Run]]]:
    """The runs of each number of models, all rounds, at the target's best concurrency."""
    return [
        (n, select(runs, target=target, models=n, concurrency=best_concurrency(runs, target, n)))
        for n in sorted({run["models"] for run in runs})
    ]


def _figure(
    file: Path, title: str, label: str, lines: dict[str, list[tuple[int, list[Run]]]]
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes, (name, value) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for line, points in lines.items():
            _line(axes, line, [(x, [value(run) for run in runs]) for x, runs in points])
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(label)
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=150)


def _line(axes: Axes, label: str, points: Series) -> None:
    middles = [statistics.median(values) for _, values in points]
    below = [m - min(values) for m, (_, values) in zip(middles, points, strict=True)]
    above = [max(values) - m for m, (_, values) in zip(middles, points, strict=True)]
    positions = [x for x, _ in points]
    axes.errorbar(positions, middles, yerr=[below, above], marker="o", capsize=3, label=label)
