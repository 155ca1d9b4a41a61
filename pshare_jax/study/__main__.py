"""`python -m pshare_jax.study run|report --config FILE.yaml`: compares fine-tuning methods.

`python -m pshare_jax.study quick FOLDER` does so in minutes, on a tiny model that it makes.

Exit codes: 0 done; 2 something that cannot be used, explained in one line on standard error; 130
interrupted: the same command goes on from there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pshare_jax.config_files import load_config
from pshare_jax.errors import PshareError
from pshare_jax.study.config import StudyConfig
from pshare_jax.study.rows import Result

_USAGE = (
    "usage: python -m pshare_jax.study run|report --config FILE.yaml [--key=value ...]\n"
    "       python -m pshare_jax.study quick FOLDER"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    command, *args = (sys.argv[1:] if argv is None else list(argv)) or [""]
    quick = command == "quick" and len(args) == 1
    if command not in ("run", "report") and not quick:
        print(_USAGE, file=sys.stderr)
        return 0 if command in ("-h", "--help") else 2
    try:
        if quick:
            _quick(Path(args[0]))
            return 0
        config = load_config(StudyConfig, args, f"python -m pshare_jax.study {command}")
        if command == "run":
            _run(config)
        else:
            _report(config)
    except PshareError as error:
        print(f"pshare_jax.study: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pshare_jax.study: stopped; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _run(config: StudyConfig) -> None:
    """Makes what is missing; goes on where it was stopped."""
    from pshare_jax.study.runner import Study
    from pshare_jax.train.report import Reporter

    reporter = Reporter()
    try:
        Study(config, reporter).make()
    finally:
        reporter.stop()


def _quick(folder: Path) -> None:
    """Makes the quick study in `folder`, or what is missing of it, and prints its tables."""
    from pshare_jax.study import report
    from pshare_jax.study.quick import quick_study

    config = quick_study(folder)
    _run(config)
    print(report.tables(report.read_results(Path(config.results))))


def _report(config: StudyConfig) -> None:
    """Writes the plots beside the results, and the tables into the document, if there is one."""
    from pshare_jax.convert.files import replace_section
    from pshare_jax.study import report
    from pshare_jax.study.teams import team_table

    folder = Path(config.results).expanduser()
    results = report.read_results(folder)
    parts = [report.glance(results), *_plots(config, results, folder)]
    parts.append(report.tables(results, config.margin))
    if config.teams:
        parts.append(team_table(report.read_teams(folder)))
    text = "\n".join(part for part in parts if part)
    if config.document:
        replace_section(config.document, config.section, text)
        print(f"{config.document}: {len(results)} results")
    else:
        print(text)


def _plots(config: StudyConfig, results: Sequence[Result], folder: Path) -> Iterator[str]:
    """Draws what there is to draw beside the results; yields links from the document."""
    from pshare_jax.study import plots

    for task in config.tasks:
        for kind, title, draw in (
            ("shares", "accuracy by share", plots.plot_shares),
            ("saved", "accuracy by prefill saved", plots.plot_saved),
        ):
            plot = folder / f"{task.name}-{kind}.png"
            if draw(results, task.name, plot):
                link = os.path.relpath(plot, Path(config.document).parent)
                yield f"![{task.name}: {title}]({link})\n"


if __name__ == "__main__":
    sys.exit(main())
