"""`python -m pshare_jax.bench COMMAND`: run a benchmark, print a table, keep the figures."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jsonargparse
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pshare_jax.bench import (
    agents,
    agents_markdown,
    agents_plots,
    agents_report,
    compile_report,
    machine,
    micro,
    shared_prefix,
)
from pshare_jax.bench import compile as compile_bench
from pshare_jax.bench.plan import command as plan
from pshare_jax.bench.plan import plots as plan_plots
from pshare_jax.bench.plan import report as plan_report
from pshare_jax.convert.files import check_section, replace_file, replace_section
from pshare_jax.convert.manifest import read_json
from pshare_jax.errors import PshareError

Keep = Callable[[dict[str, Any]], None]
"""Writes the figures so far where `--json` says: they may be of hours."""

# Columns of a table that goes into a file or a pipe.
_FILE_WIDTH = 150
# Of what a table of profiles shows.
_LEAST_SHARE = 0.01


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = jsonargparse.ArgumentParser(
        prog="pshare_jax.bench", description="Measures the engine and the server."
    )
    micro_parser = jsonargparse.ArgumentParser(
        description="Prefill and decode speed of one model through the engine."
    )
    micro_parser.add_class_arguments(micro.MicroOptions)
    compile_parser = jsonargparse.ArgumentParser(
        description="Compiles kernels and steps for TPUs and GPUs that need not be there."
    )
    compile_parser.add_class_arguments(compile_bench.CompileOptions)
    compile_parser.add_argument(
        "--plot", type=str | None, default=None, help="PNG of the bytes that shared prefixes save"
    )
    compile_parser.add_argument("--markdown", type=str | None, default=None, help="file for tables")
    compile_parser.add_argument(
        "--merge", type=list[str], default=[], help="files of --json whose other rows are kept"
    )
    agents_parser = jsonargparse.ArgumentParser(
        description="Sessions of several models over one context, over HTTP."
    )
    agents_parser.add_argument("--config", action="config", help="YAML file with the keys below")
    agents_parser.add_class_arguments(agents.AgentsOptions)
    agents_parser.add_argument(
        "--plots", type=str | None, default=None, help="folder for plots (PNG); needs matplotlib"
    )
    plan_parser = jsonargparse.ArgumentParser(
        description="Predicts throughput and latency by a simulation of the serving system."
    )
    plan_parser.add_argument("--config", action="config", help="YAML file with the keys below")
    plan_parser.add_class_arguments(plan.PlanOptions)
    plan_parser.add_argument(
        "--markdown", type=str | None, default=None, help="document with markers for the tables"
    )
    plan_parser.add_argument(
        "--plots", type=str | None, default=None, help="folder for plots (PNG); needs matplotlib"
    )
    report_parser = jsonargparse.ArgumentParser(
        description="Writes results of `bench agents` into a document, with plots beside them."
    )
    report_parser.add_class_arguments(ReportOptions)
    for command in (micro_parser, compile_parser, agents_parser, plan_parser):
        command.add_argument("--json", type=str | None, default=None, help="file for the figures")
    commands = parser.add_subcommands(dest="command")
    commands.add_subcommand("micro", micro_parser)
    commands.add_subcommand("compile", compile_parser)
    commands.add_subcommand("agents", agents_parser)
    commands.add_subcommand("plan", plan_parser)
    commands.add_subcommand("report", report_parser)
    benches = {"micro": _micro, "compile": _compile, "agents": _agents, "plan": _plan}
    draws = {"agents": agents_plots.draw, "plan": plan_plots.draw}
    try:
        arguments = parser.instantiate(parser.parse_args(None if argv is None else list(argv)))
        options = dict(arguments[arguments.command])
        if arguments.command == "report":
            _report(ReportOptions(**options))
            return 0
        json_file, plots = options.pop("json"), options.pop("plots", None)
        if plots is not None:
            agents_plots.check_installed()

        def keep(figures: dict[str, Any]) -> None:
            if json_file is not None:
                replace_file(json_file, json.dumps(figures, indent=2) + "\n")

        result = benches[arguments.command](options, keep)
        # The figures first: plots can be drawn again.
        keep(result)
        if plots is not None:
            draws[arguments.command](result, Path(plots))
    except PshareError as error:
        print(f"pshare_jax.bench: {error}", file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True)
class ReportOptions:
    """What `bench report` reads and writes.

    Args:
        results: files of `bench agents --json`, in the order in which they are to be read.
        document: has the markers `agents`; what stands between them is replaced.
        plots: folder for the plots.
    """

    results: list[str]
    document: str = "docs/benchmarks.md"
    plots: str = "docs/results"


def _report(options: ReportOptions) -> None:
    folder, document = Path(options.plots), Path(options.document)
    sections = []
    for file in map(Path, options.results):
        result = read_json(file)
        drawn = agents_plots.draw(result, folder, f"{file.stem}-")
        plots = [Path(os.path.relpath(plot, document.parent)) for plot in drawn]
        sections.append(agents_markdown.markdown(result, result["options"]["title"], plots))
    replace_section(document, "agents", "\n".join(sections))


def _agents(options: dict[str, Any], _: Keep) -> dict[str, Any]:
    options.pop("config", None)
    columns = (TextColumn("calls"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        result = agents.run(
            agents.AgentsOptions(**options),
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    result["machine"] = machine.describe()
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    console.print(agents_report.runs_table(result))
    for line in (*agents_report.lines(result), machine.one_line(result["machine"])):
        console.print(line, soft_wrap=True)
    return result


def _plan(options: dict[str, Any], _: Keep) -> dict[str, Any]:
    options.pop("config", None)
    document = options.pop("markdown")
    if document is not None:
        check_section(document, "plan")
    columns = (TextColumn("predictions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        result = plan.run(
            plan.PlanOptions(**options),
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    for name, tables in plan_report.sections(result).items():
        print(tables)
        if document is not None:
            replace_section(document, name, tables)
    return result


def _micro(options: dict[str, Any], _: Keep) -> dict[str, Any]:
    result = micro.run(micro.MicroOptions(**options))
    result["machine"] = machine.describe()
    _show(result)
    return result


def _compile(options: dict[str, Any], keep: Keep) -> dict[str, Any]:
    markdown_file, plot = options.pop("markdown"), options.pop("plot")
    earlier = [json.loads(Path(file).read_text()) for file in options.pop("merge")]

    def keep_so_far(outcome: compile_bench.Outcome, so_far: dict[str, Any]) -> None:
        print(compile_report.line(asdict(outcome)), flush=True)
        keep(compile_report.merged([*earlier, so_far]))

    new = compile_bench.run(compile_bench.CompileOptions(**options), keep_so_far)
    result = compile_report.merged([*earlier, new])
    if plot is not None and "shared_prefix" in result:
        shared_prefix.draw(result["shared_prefix"], Path(plot))
    if markdown_file is not None:
        Path(markdown_file).write_text(compile_report.markdown(result))
    return result


def _show(result: dict[str, Any]) -> None:
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
        table.add_row(f"decode, {micro.LORA_ROWS} rows of {rows} (LoRA)", *_cells(rate, None))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    console.print(table)
    if result["profiles"]:
        console.print(_profiles_table(result["profiles"]))
    console.print(f"{options['repeats']} repeats. {machine.one_line(result['machine'])}")


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


if __name__ == "__main__":
    sys.exit(main())
