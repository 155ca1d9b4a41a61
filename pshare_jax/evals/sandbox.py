"""Runs untrusted Python with its tests in a process of its own, with limits."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from pshare_jax.errors import EvaluationError
from pshare_jax.evals.sandbox_filter import compiled_filter

logger = logging.getLogger(__name__)

_RUNNER = Path(__file__).with_name("sandbox_runner.py")
_MAX_REPORT_BYTES = 1 << 16
_KILLED = 128 + signal.SIGKILL


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Args:
        seconds: wall-clock time, start of the interpreter included.
        cpu_seconds: processor time.
        memory_mib: address space.
        file_mib: size of a file.
        processes: processes and threads of the user it runs as; not enforced for root.
    """

    seconds: int = 10
    cpu_seconds: int = 5
    memory_mib: int = 1024
    file_mib: int = 8
    processes: int = 32


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Program:
    """An answer and what it is tested with.

    Args:
        answer: Python source that is not trusted.
        tests: Python source that raises when the answer is wrong.
        entry_point: a name that the answer must define.
        has_check: whether the tests define `check`, to be called with the entry point.
    """

    answer: str
    tests: str
    entry_point: str
    has_check: bool = False


@dataclass(frozen=True)
class Outcome:
    """Whether all tests ran and none failed; `detail` says why not."""

    passed: bool
    detail: str


def run(program: Program, limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """Runs a program: a fresh interpreter with nothing but the standard library.

    Leaves no process and no file behind. docs/evaluation.md says what it protects from.

    Raises:
        EvaluationError: the interpreter could not be started or isolated, which is not the answer's
            fault.
    """
    token = secrets.token_hex(16)
    rules = base64.b64encode(compiled_filter() or b"").decode()
    told = {"token": token, "filter": rules, **asdict(program), **asdict(limits)}
    job = json.dumps(told).encode()
    read_end, write_end = os.pipe()
    try:
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            tempfile.TemporaryFile() as errors,
        ):
            try:
                code = _run(job, limits.seconds, folder, write_end, errors)
            finally:
                os.close(write_end)
            report = _report(read_end, token)
            if not any(line.startswith("ready ") for line in report):
                raise EvaluationError(f"the sandbox cannot be started: {_tail(errors)}")
            if "ready isolated" not in report:
                _warn_of_no_isolation()
    finally:
        os.close(read_end)
    return _outcome(report, code, limits)


@functools.cache
def _warn_of_no_isolation() -> None:
    logger.warning(
        "answers run without namespaces, which this system does not permit: they can read the "
        "files of the user they run as, and a determined one can do more; see docs/evaluation.md"
    )


def check() -> None:
    """Runs a program that is right.

    Raises:
        EvaluationError: it does not pass, so that no answer would.
    """
    outcome = run(Program("def one():\n    return 1\n", "assert one() == 1\n", "one"))
    if not outcome.passed:
        raise EvaluationError(f"the sandbox does not work here: {outcome.detail}")


def _run(job: bytes, seconds: int, folder: str, report_to: int, errors: IO[bytes]) -> int | None:
    """The exit code; None when its time was over."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_RUNNER), str(report_to)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        cwd=folder,
        env={"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
        pass_fds=(report_to,),
        start_new_session=True,
    )
    try:
        process.communicate(job, timeout=seconds)
        return process.returncode
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _report(read_end: int, token: str) -> list[str]:
    """The lines that carry the token, without it. Others come from the answer."""
    os.set_blocking(read_end, False)
    try:
        content = os.read(read_end, _MAX_REPORT_BYTES)
    except BlockingIOError:
        content = b""
    lines = content.decode(errors="replace").splitlines()
    return [line.removeprefix(f"{token} ") for line in lines if line.startswith(f"{token} ")]


def _outcome(report: list[str], code: int | None, limits: Limits) -> Outcome:
    if "passed" in report:
        return Outcome(True, "all tests pass")
    for line in report:
        if line.startswith("failed "):
            return Outcome(False, line.removeprefix("failed "))
    if code is None:
        return Outcome(False, f"not done after {limits.seconds} s")
    if code in (_KILLED, -signal.SIGKILL):
        return Outcome(False, f"killed, mostly for more than {limits.cpu_seconds} s of CPU time")
    return Outcome(False, f"ended before its tests did, with exit code {code}")


def _tail(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it ended without a message"
