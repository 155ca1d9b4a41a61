"""Running compilers: as many at a time as there are CPUs, and none of them when it is over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

TIMEOUT_SECONDS = 600
_LOOK_SECONDS = 0.02
"""Between two looks at compilers that run for seconds."""


class NativeBuildError(Exception):
    """The library cannot be compiled on this machine; the message says why in one line."""


def compile_library(
    compiler: Sequence[str], link_flags: Sequence[str], sources: Path, made: Path
) -> None:
    """Compiles each `*.cc` of the folder `sources`, side by side, and links the library `made`.

    Args:
        compiler: with the flags of each file.
        made: its folder takes all that is made on the way, too.

    Raises:
        NativeBuildError: a compiler fails, of the first file that does, or takes too long.
    """
    folder = made.parent
    objects = {folder / f"{file.stem}.o": file for file in sorted(sources.glob("*.cc"))}
    _run_all([[*compiler, "-c", str(file), "-o", str(to)] for to, file in objects.items()], folder)
    _run_all([[*compiler, *link_flags, *map(str, objects), "-o", str(made)]], folder)


def _run_all(commands: Sequence[Sequence[str]], folder: Path) -> None:
    """Runs commands, as many at a time as there are CPUs; their temporary files are in `folder`.

    However it ends, no process is left.

    Raises:
        NativeBuildError: one fails, which ends the others, or all take longer than TIMEOUT_SECONDS.
    """
    waiting, running = list(commands), list[_Running]()
    deadline = time.monotonic() + TIMEOUT_SECONDS
    with contextlib.ExitStack() as stack:
        while waiting or running:
            while waiting and len(running) < _cpus():
                running.append(stack.enter_context(_started(waiting.pop(0), folder)))
            running = [one for one in running if not one.ended()]
            if running and time.monotonic() > deadline:
                raise NativeBuildError(
                    f"{commands[0][0]}: it takes longer than {TIMEOUT_SECONDS} seconds"
                )
            time.sleep(_LOOK_SECONDS if running else 0)


@dataclass(frozen=True)
class _Running:
    compiler: str
    process: subprocess.Popen[bytes]
    errors: IO[bytes]

    def ended(self) -> bool:
        """Whether it has done what it should; raises NativeBuildError if it has failed."""
        code = self.process.poll()
        if code:
            self.errors.seek(0)
            raise failed(self.compiler, self.errors.read().decode(errors="replace"))
        return code == 0


@contextlib.contextmanager
def _started(command: Sequence[str], folder: Path) -> Iterator[_Running]:
    """A process with a group of its own: a compiler has children, which would outlive it."""
    with tempfile.TemporaryFile(dir=folder) as errors:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={**os.environ, "TMPDIR": str(folder)},
                process_group=0,
            )
        except OSError as error:
            raise NativeBuildError(f"{command[0]}: {error}") from error
        try:
            yield _Running(command[0], process, errors)
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def output_of(command: Sequence[str]) -> str:
    """What a compiler writes to standard output.

    Raises:
        NativeBuildError: it fails, or takes too long.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise failed(command[0], done.stderr)
    return done.stdout


def failed(compiler: str, errors: str) -> NativeBuildError:
    """What to raise for a compiler that has written `errors`: the first of them in one line."""
    lines = [line for line in errors.splitlines() if "error" in line] or [errors]
    return NativeBuildError(f"{compiler} failed: {lines[0].strip()}")


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
