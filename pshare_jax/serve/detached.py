"""`python -m pshare_jax.serve.detached LOCK LISTEN[,LISTEN] COMMAND...`: what nobody's death ends.

The command runs in a session of its own, as nobody's child, so that what ends the caller with all
that belongs to it does not end the command. What the caller is told comes by the standard output
that the command has, too: a line `pid N` at the start, and a line `exit N` at the end.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence

PID, EXIT = "pid ", "exit "
"""How the lines begin."""


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns once it has been handed over.

    Args:
        argv: descriptor of a locked file, which the command keeps open and into which its process
            id is written; descriptors of sockets, which the command inherits; the command.
    """
    lock, command = int(argv[0]), list(argv[2:])
    sockets = [int(descriptor) for descriptor in argv[1].split(",")]
    if os.fork():
        return 0
    os.setsid()
    process = subprocess.Popen(command, pass_fds=(lock, *sockets))
    for descriptor in sockets:
        os.close(descriptor)
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(process.pid).encode(), 0)
    _say(f"{PID}{process.pid}")
    _say(f"{EXIT}{process.wait()}")
    os._exit(0)


def _say(line: str) -> None:
    # The caller may be gone.
    with contextlib.suppress(OSError):
        os.write(1, f"{line}\n".encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
