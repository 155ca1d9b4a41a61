"""`pshare COMMAND ...`: the commands of the package under one name.

`pshare serve ARGS` is `python -m pshare_jax.serve ARGS`, and so on: what a command prints, reads
and returns is its module's own affair.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from pshare_jax import __version__

COMMANDS = {
    "serve": ("pshare_jax.serve", "serve decode modules over one prefill module"),
    "worker": ("pshare_jax.serve.worker", "one worker process of a cluster, for `pshare serve`"),
    "train": ("pshare_jax.train", "train a decode module on the base's KV cache"),
    "convert": ("pshare_jax.convert", "make checkpoints from Hugging Face, PEFT and GGUF, or back"),
    "eval": ("pshare_jax.evals", "grade the answers of served models"),
    "demo": ("pshare_jax.demo", "play a session with and without sharing, in a checkout"),
}
"""A command: the module that it runs, and what for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0 after help, 2 for a command that is not known.

    Otherwise the command's own exit code is returned. It runs as `__main__`, as with `python -m`.

    Args:
        argv: the arguments without the program's name; those of the process by default.
    """
    command, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if command in ("-h", "--help"):
        print(_help())
        return 0
    if command in ("-V", "--version"):
        print(f"pshare {__version__}")
        return 0
    if command not in COMMANDS:
        print(f"pshare: there is no command {command!r}\n\n{_help()}", file=sys.stderr)
        return 2
    sys.argv = [f"pshare {command}", *rest]
    try:
        runpy.run_module(COMMANDS[command][0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return _exit_code(end)
    return 0


def _exit_code(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        ["usage: pshare COMMAND [ARGUMENTS]", "", *lines, "", "pshare COMMAND --help says more."]
    )


if __name__ == "__main__":
    sys.exit(main())
