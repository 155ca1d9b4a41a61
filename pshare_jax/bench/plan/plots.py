"""The plots of `bench plan`; matplotlib comes with the `bench` extra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pshare_jax.bench.agents_plots import check_installed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PREDICTED = "predicted, not measured"


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Writes `plan-splits.png`, `plan-load.png` and, where runs were compared, `plan-validate.png`.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    check_installed()
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    if result["predictions"]:
        files += [folder / "plan-splits.png", folder / "plan-load.png"]
        _draw_splits(result, files[0])
        _draw_load(result, files[1])
    if result["validation"]:
        files.append(folder / "plan-validate.png")
        _draw_validation(result, files[-1])
    return files


def _machines(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(case["machine"] for case in result["predictions"]))


def _draw_splits(result: dict[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    machines = _machines(result)
    figure = Figure(figsize=(4.5 * len(machines), 4), layout="constrained")
    figure.suptitle(f"{result['options']['predict']['model']}, models that share: {_PREDICTED}")
    panels = figure.subplots(1, len(machines), squeeze=False)[0]
    for axes, machine in zip(panels, machines, strict=True):
        for case in result["predictions"]:
            if case["machine"] == machine and case["splits"]:
                rows = case["splits"]
                axes.plot(
                    [row["prefill_devices"] for row in rows],
                    [row["generated_tokens_per_s"] for row in rows],
                    marker="o",
                    linestyle="--" if case["modules"] == "lora" else "-",
                    label=f"{case['models']} {case['modules']} modules",
                )
        axes.set_title(machine, fontsize=10)
        _finish(axes, "devices that prefill", "generated tokens/s")
    figure.savefig(file, dpi=150)


def _draw_load(result: dict[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    machines = _machines(result)
    figure = Figure(figsize=(9, 3.5 * len(machines)), layout="constrained")
    figure.suptitle(f"{result['options']['predict']['model']}, best layouts: {_PREDICTED}")
    panels = figure.subplots(len(machines), 2, squeeze=False)
    for (left, right), machine in zip(panels, machines, strict=True):
        for case in result["predictions"]:
            for mode, key in (("shared", "curve"), ("isolated", "isolated_curve")):
                if case["machine"] != machine or key not in case:
                    continue
                live = [row["concurrency"] for row in case[key]]
                style = {
                    "marker": "o" if case["modules"] == "full" else "s",
                    "linestyle": "-" if mode == "shared" else ":",
                    "label": f"{case['models']} {case['modules']}, {mode}",
                }
                left.plot(live, [row["generated_tokens_per_s"] for row in case[key]], **style)
                right.plot(live, [row["call_s"]["p95"] for row in case[key]], **style)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_title(machine, fontsize=10)
        _finish(left, "live sessions", "generated tokens/s")
        _finish(right, "live sessions", "p95 call latency, s")
    figure.savefig(file, dpi=150)


def _draw_validation(result: dict[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    rows = result["validation"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle("measured (points) and predicted (lines)", fontsize=10)
    panels = (("generated_tokens_per_s", "generated tokens/s"), ("call_p95_s", "p95 of calls, s"))
    for axes, (figure_name, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for target, models in dict.fromkeys((row["target"], row["models"]) for row in rows):
            mine = [row for row in rows if (row["target"], row["models"]) == (target, models)]
            live = [row["concurrency"] for row in mine]
            [line] = axes.plot(live, [row["predicted"][figure_name] for row in mine])
            points = [row["measured"][figure_name] for row in mine]
            axes.scatter(live, points, color=line.get_color(), label=f"{target}, {models} models")
        _finish(axes, "live sessions", label)
    figure.savefig(file, dpi=150)


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
