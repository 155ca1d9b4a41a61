"""`python -m pshare_jax.evals run|compare|import`: how often served models answer rightly.

Exit codes: 0 done; 2 something that cannot be used, explained in one line on standard error; 130
interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from pshare_jax.errors import EvaluationError, PshareError
from pshare_jax.evals import benchmarks, report
from pshare_jax.evals.backend import Backend, Sampling
from pshare_jax.evals.compare import compare
from pshare_jax.evals.items import Item, file_sha256, read_items
from pshare_jax.evals.results import check_writable, read_result, write_file, write_result
from pshare_jax.evals.run import evaluate
from pshare_jax.extras import require


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pshare_jax.evals",
        description="Measures how often a model answers rightly.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_run(commands.add_parser("run", help="answer the items of a file and grade the answers"))
    command = commands.add_parser("compare", help="compare two results on the same items")
    command.add_argument("a", metavar="A.json")
    command.add_argument("b", metavar="B.json")
    command.add_argument("--json", metavar="FILE", help="write the comparison to a file too")
    importing = commands.add_parser("import", help="make a file of items from a benchmark's files")
    benchmark = importing.add_subparsers(dest="benchmark", required=True)
    command = benchmark.add_parser("human-eval", help="functions to complete")
    command.add_argument("problems", metavar="HumanEval.jsonl.gz")
    command.add_argument("dest", metavar="ITEMS.jsonl")
    command = benchmark.add_parser("bfcl", help="function calls, single-turn Python questions")
    command.add_argument("questions", metavar="BFCL_v4_NAME.json")
    command.add_argument("answers", metavar="possible_answer/BFCL_v4_NAME.json")
    command.add_argument("dest", metavar="ITEMS.jsonl")
    return parser


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", required=True, metavar="FILE.jsonl", help="the items")
    command.add_argument("--output", required=True, metavar="FILE.json", help="the result")
    command.add_argument("--model", required=True, help="name under which the model is served")
    origin = command.add_mutually_exclusive_group(required=True)
    origin.add_argument("--url", help="of a running server with OpenAI's API")
    origin.add_argument("--config", metavar="FILE.yaml", help="serving configuration to load")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="with --config: another value of a key, such as decode.max_num_seqs=64; repeatable",
    )
    command.add_argument("--limit", type=_positive, help="only so many items, the first ones")
    defaults = Sampling()
    command.add_argument(
        "--max-tokens",
        type=_positive,
        default=defaults.max_tokens,
        help="most tokens of an answer (default %(default)s)",
    )
    command.add_argument(
        "--temperature", type=float, default=defaults.temperature, help="default 0: greedy"
    )
    command.add_argument("--seed", type=int, default=defaults.seed, help="default %(default)s")
    command.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends an answer; repeatable"
    )
    command.add_argument(
        "--concurrency",
        type=_positive,
        default=64,
        help="with --url: requests at once (default %(default)s)",
    )
    command.add_argument(
        "--api-key-variable",
        metavar="NAME",
        help="with --url: environment variable that holds the server's key",
    )
    command.add_argument(
        "--grading-processes",
        type=_positive,
        help="programs of kind code that run at once (default: half of the cores)",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        if args.command != "import":
            require("eval", f"`{args.command}`")
        return {"run": _run, "compare": _compare, "import": _import}[args.command](args)
    except PshareError as error:
        print(f"pshare_jax.evals: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    check_writable(args.output)
    items = read_items(args.data)[: args.limit]
    data = {"file": str(args.data), "sha256": file_sha256(args.data), "items": len(items)}
    head = {"command": "run", "model": args.model, "data": data}
    sampling = Sampling(args.max_tokens, args.temperature, args.seed, tuple(args.stop))
    if args.url is not None:
        from pshare_jax.evals.server import ServerBackend

        backend = ServerBackend(
            args.url, args.model, concurrency=args.concurrency, api_key=_api_key(args)
        )
        result = _evaluate(args, backend, items, sampling)
    else:
        # Imported late: jax takes seconds, which --help and a typing error need not wait for.
        from pshare_jax.engine.offline import Engine
        from pshare_jax.evals.offline import OfflineBackend

        with Engine.from_config(args.config, *(f"--{pair}" for pair in args.set)) as engine:
            backend = OfflineBackend(engine, args.model)
            result = _evaluate(args, backend, items, sampling)
    write_result(args.output, {**head, **result})
    print(report.summary({**head, **result}))
    return 0


def _evaluate(
    args: argparse.Namespace, backend: Backend, items: Sequence[Item], sampling: Sampling
) -> dict[str, Any]:
    with report.progress_bar(args.model, len(items)) as show:
        return evaluate(
            backend, items, sampling, grading_processes=args.grading_processes, report=show
        )


def _api_key(args: argparse.Namespace) -> str:
    if args.api_key_variable is None:
        return ""
    if not (key := os.environ.get(args.api_key_variable)):
        raise EvaluationError(f"--api-key-variable: {args.api_key_variable} is not set")
    return key


def _compare(args: argparse.Namespace) -> int:
    comparison = compare(read_result(args.a), read_result(args.b))
    if args.json is not None:
        fields = {"a": args.a, "b": args.b, **dataclasses.asdict(comparison)}
        write_result(args.json, fields)
    Console(highlight=False).print(report.comparison_table(comparison, args.a, args.b))
    return 0


def _import(args: argparse.Namespace) -> int:
    check_writable(args.dest)
    if args.benchmark == "human-eval":
        records = benchmarks.human_eval(args.problems)
    else:
        records = benchmarks.bfcl(args.questions, args.answers)
    write_file(args.dest, "".join(f"{json.dumps(record)}\n" for record in records))
    print(f"{len(records)} items in {args.dest}")
    return 0


if __name__ == "__main__":
    # Set before transformers is imported: nothing here needs the hub's progress bars or forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
