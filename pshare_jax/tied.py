"""`tied.py PARENT COMMAND...`: a command that ends with the process that has started it.

A script that imports nothing but the standard library: it becomes the command within milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def tied(command: Sequence[str]) -> list[str]:
    """What to run in place of `command`, so that it gets SIGUSR1 when the caller has ended.

    However the caller ends, by SIGKILL too. SIGUSR1 ends whoever does not handle it, and may come
    once for each of the caller's threads. Linux tells the end of the thread that starts the
    process, so it must be one that lives as long as the caller; other systems tell nothing, and the
    command runs as it is.
    """
    return [sys.executable, "-I", "-S", os.path.realpath(__file__), str(os.getpid()), *command]


def main(argv: Sequence[str]) -> None:
    """Becomes the command; never returns.

    Args:
        argv: id of the process that it is to end with; the command.
    """
    parent, command = int(argv[0]), list(argv[1:])
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
    if prctl is not None:
        # What becomes of a process that it executes, too.
        prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit(f"{' '.join(command)}: not started, since process {parent} has ended")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
