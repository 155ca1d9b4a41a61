"""`python -m pshare_jax.bench COMMAND`: run a benchmark, print a table, keep the figures."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
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
    micro_report,
    shared_prefix,
    soak,
    soak_options,
    training,
)
from pshare_jax.bench import compile as compile_bench
from pshare_jax.bench.plain import PLAIN, PlainCommand, never_failed
from pshare_jax.bench.plan import command as plan
from pshare_jax.bench.plan import plots as plan_plots
from pshare_jax.bench.plan import report as plan_report
from pshare_jax.convert.files import check_section, replace_file, replace_section
from pshare_jax.convert.manifest import read_json
from pshare_jax.errors import PshareError
from pshare_jax.runtime.host_memory import computes_on_cpus, keep_freed_memory

Keep = Callable[[dict[str, Any]], None]
"""Writes the figures so far where `--json` says: they may be of hours."""


# Columns of a table that goes into a file or a pipe.
_FILE_WIDTH = 150


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = _parser()
    try:
        arguments = parser.instantiate(parser.parse_args(None if argv is None else list(argv)))
        options = dict(arguments[arguments.command])
        if arguments.command == "report":
            _report(ReportOptions(**options))
            return 0
        return _measure(_COMMANDS[arguments.command], options)
    except PshareError as error:
        print(f"pshare_jax.bench: {error}", file=sys.stderr)
        return 2


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="pshare_jax.bench", description="Measures the engine and the server."
    )
    commands = parser.add_subcommands(dest="command")
    for name, command in _COMMANDS.items():
        of_command = jsonargparse.ArgumentParser(description=command.description)
        if command.configurable:
            of_command.add_argument(
                "--config", action="config", help="YAML file with the keys below"
            )
        of_command.add_class_arguments(command.options)
        for flag, (kind, default, meaning) in command.flags.items():
            of_command.add_argument(flag, type=kind, default=default, help=meaning)
        if command.draw is not None:
            of_command.add_argument(
                "--plots",
                type=str | None,
                default=None,
                help="folder for plots (PNG); needs matplotlib",
            )
        of_command.add_argument(
            "--json", type=str | None, default=None, help="file for the figures"
        )
        commands.add_subcommand(name, of_command)
    report = jsonargparse.ArgumentParser(
        description="Writes results of `bench agents` into a document, with plots beside them."
    )
    report.add_class_arguments(ReportOptions)
    commands.add_subcommand("report", report)
    return parser


def _measure(command: _Command, options: dict[str, Any]) -> int:
    """Runs a benchmark and keeps what it found; the exit code."""
    options.pop("config", None)
    json_file, plots = options.pop("json"), options.pop("plots", None)
    if plots is not None:
        agents_plots.check_installed()

    def keep(figures: dict[str, Any]) -> None:
        if json_file is not None:
            replace_file(json_file, json.dumps(figures, indent=2) + "\n")

    result = command.run(options, keep)
    # The figures first: plots can be drawn again.
    keep(result)
    if command.failed(result):
        return 1
    if command.draw is not None and plots is not None:
        command.draw(result, Path(plots))
    return 0


def _plain(plain: PlainCommand, options: dict[str, Any], _: Keep) -> dict[str, Any]:
    result = plain.run(plain.options(**options))
    result.setdefault("machine", machine.describe())
    print("\n".join([*plain.lines(result), "", machine.one_line(result["machine"])]))
    return result


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
    with _bar("calls") as progress:
        result = agents.run(agents.AgentsOptions(**options), progress)
    result["machine"] = machine.describe()
    _print(
        agents_report.runs_table(result),
        *agents_report.lines(result),
        machine.one_line(result["machine"]),
    )
    return result


def _soak(options: dict[str, Any], _: Keep) -> dict[str, Any]:
    with _bar("seconds") as progress:
        result = soak.run(soak_options.SoakOptions(**options), progress)
    result["machine"] = machine.describe()
    table = Table("", "found", "bound", "kept")
    for name, verdict in result["verdicts"].items():
        table.add_row(name, verdict["found"], verdict["bound"], "yes" if verdict["kept"] else "NO")
    requests = (
        f"{kind}: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
        for kind, outcomes in sorted(result["requests"].items())
    )
    _print(table, *requests, *result["faults"][:10], machine.one_line(result["machine"]))
    return result


def _plan(options: dict[str, Any], _: Keep) -> dict[str, Any]:
    document = options.pop("markdown")
    if document is not None:
        check_section(document, "plan")
    with _bar("predictions") as progress:
        result = plan.run(plan.PlanOptions(**options), progress)
    for name, tables in plan_report.sections(result).items():
        print(tables)
        if document is not None:
            replace_section(document, name, tables)
    return result


def _train(options: dict[str, Any], _: Keep) -> dict[str, Any]:
    with _bar("runs") as progress:
        result = training.run(training.TrainingOptions(**options), progress)
    result["machine"] = machine.describe()
    _print(
        training.table(result),
        f"{options['rounds']} rounds. {machine.one_line(result['machine'])}",
    )
    return result


def _micro(options: dict[str, Any], _: Keep) -> dict[str, Any]:
    result = micro.run(micro.MicroOptions(**options))
    result["machine"] = machine.describe()
    _print(
        *micro_report.tables(result),
        f"{options['repeats']} repeats. {machine.one_line(result['machine'])}",
    )
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


@dataclass(frozen=True)
class _Command:
    """A command of `bench`.

    Args:
        description: for `--help`.
        options: the class of its options.
        run: what it does; gets the options, with those of `flags`, and keeps figures so far.
        flags: options that are not of the class: type, default, meaning.
        configurable: whether a YAML file may give them.
        draw: draws plots of the result into a folder.
        failed: whether the result is a failure.
    """

    description: str
    options: type
    run: Callable[[dict[str, Any], Keep], dict[str, Any]]
    flags: Mapping[str, tuple[Any, Any, str]] = field(default_factory=dict)
    configurable: bool = False
    draw: Callable[[dict[str, Any], Path], object] | None = None
    failed: Callable[[dict[str, Any]], bool] = never_failed


_COMMANDS: dict[str, _Command] = {
    "micro": _Command(
        "Prefill and decode speed of one model through the engine.", micro.MicroOptions, _micro
    ),
    "compile": _Command(
        "Compiles kernels and steps for TPUs and GPUs that need not be there.",
        compile_bench.CompileOptions,
        _compile,
        flags={
            "--plot": (str | None, None, "PNG of the bytes that shared prefixes save"),
            "--markdown": (str | None, None, "file for tables"),
            "--merge": (list[str], [], "files of --json whose other rows are kept"),
        },
    ),
    "agents": _Command(
        "Sessions of several models over one context, over HTTP.",
        agents.AgentsOptions,
        _agents,
        configurable=True,
        draw=agents_plots.draw,
    ),
    "plan": _Command(
        "Predicts throughput and latency by a simulation of the serving system.",
        plan.PlanOptions,
        _plan,
        flags={"--markdown": (str | None, None, "document with markers for the tables")},
        configurable=True,
        draw=plan_plots.draw,
    ),
    "train": _Command(
        "Seconds a training step takes, in each way to train.", training.TrainingOptions, _train
    ),
    "soak": _Command(
        "Mixed traffic for a while: does anything grow, or go wrong?",
        soak_options.SoakOptions,
        _soak,
        failed=lambda result: not all(v["kept"] for v in result["verdicts"].values()),
    ),
    **{
        name: _Command(
            plain.description, plain.options, partial(_plain, plain), failed=plain.failed
        )
        for name, plain in PLAIN.items()
    },
}


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; gives the function that says how much of how much is done."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(*parts: Table | str) -> None:
    """Tables, and lines that are not wrapped."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


if __name__ == "__main__":
    # As the command that is measured does.
    if sys.argv[1:2] == ["train"] and computes_on_cpus():
        keep_freed_memory()
    sys.exit(main())
