"""Runs one untrusted program and its tests; `sandbox.py` starts it, in a process of its own.

A script that imports nothing but the standard library. It is handed a file descriptor to report on
and, on standard input, a JSON object: `token` (proves that a report is its own), `answer`, `tests`,
`entry_point`, `has_check` (whether the tests define a function `check` of the candidate), and the
limits. What it protects from, and what not, is in docs/evaluation.md.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

_NOBODY = 65534
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_DENIED_PREFIXES = ("socket.", "ctypes.", "gc.get_", "resource.", "subprocess.", "pty.")
_DENIED = {
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.killpg",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "sys._current_frames",
}
# Audit events of changes to files: where their arguments have a path and its dir_fd.
_CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.chflags": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.link": ((0, 2), (1, 3)),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.removexattr": ((0, None),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.setxattr": ((0, None),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
}
_DETAIL_CHARACTERS = 200


def main() -> None:
    """Limits, isolates and runs; never returns."""
    report_to = int(sys.argv[1])
    job = json.loads(sys.stdin.buffer.read())
    is_root = os.geteuid() == 0
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(job["seconds"] + 1)
    _enter_namespaces(is_root)
    if is_root:
        _become_nobody()
    _end_with_parent()
    _limit(job)
    folder = os.path.realpath(".")
    null = os.open(os.devnull, os.O_RDWR)
    os.write(report_to, f"{job['token']} ready\n".encode())
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    _guard(folder)
    _run(report_to, job)


def _enter_namespaces(is_root: bool) -> None:
    """Goes on in new network and process namespaces, where that is permitted.

    There it is the first process: when it ends, the kernel ends all that it has started.
    """
    if sys.platform != "linux":
        return
    flags = _CLONE_NEWNET | _CLONE_NEWPID
    if ctypes.CDLL(None).unshare(flags if is_root else flags | _CLONE_NEWUSER) != 0:
        return
    _end_with_parent()
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        # As a shell does: 128 + the signal.
        os._exit(status if status >= 0 else 128 - status)


def _end_with_parent() -> None:
    # Forgotten when a process changes its user, so it comes after that.
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _become_nobody() -> None:
    """From root to a user who owns nothing, unless Python could not be read any more."""
    os.chown(".", _NOBODY, _NOBODY)
    os.seteuid(_NOBODY)
    readable = os.access(os.__file__, os.R_OK, effective_ids=True)
    os.seteuid(0)
    if readable:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def _limit(job: dict[str, Any]) -> None:
    limits = {
        "RLIMIT_CPU": job["cpu_seconds"],
        "RLIMIT_AS": job["memory_mib"] << 20,
        "RLIMIT_FSIZE": job["file_mib"] << 20,
        "RLIMIT_NPROC": job["processes"],
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (ValueError, OSError):
            if sys.platform == "linux":
                raise


def _guard(folder: str) -> None:
    """Denies sockets, processes and changes of files outside `folder`. Hooks cannot be removed."""
    realpath, isdir = os.path.realpath, os.path.isdir
    allowed, inside = {folder, os.devnull}, folder + os.sep

    def locate(path: Any, dir_fd: Any = -1) -> str:
        if isinstance(path, int):
            return realpath(f"/proc/self/fd/{path}")
        name = os.fsdecode(path)
        return realpath(name if dir_fd == -1 else f"/proc/self/fd/{dir_fd}/{name}")

    def check(real: str) -> None:
        if real not in allowed and not real.startswith(inside):
            raise PermissionError("files outside the working folder may not be changed")

    def check_open(path: Any, mode: Any, flags: Any) -> None:
        if isinstance(path, int):
            return
        real = locate(path)
        # What is opened below a folder by its descriptor raises no event with the whole path.
        if (isinstance(flags, int) and flags & _WRITING) or (mode is None and isdir(real)):
            check(real)
        if real.startswith("/proc/"):
            raise PermissionError("/proc may not be read")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            check_open(*arguments)
        elif event in _CHANGES:
            for path, dir_fd in _CHANGES[event]:
                check(locate(arguments[path], -1 if dir_fd is None else arguments[dir_fd]))
        elif event in _DENIED or event.startswith(_DENIED_PREFIXES):
            raise PermissionError(f"{event} is not permitted here")

    import _posixsubprocess

    def no_process(*_: Any) -> None:
        raise PermissionError("processes may not be started here")

    # The one way to a new process that raises no audit event.
    _posixsubprocess.fork_exec = no_process
    sys.addaudithook(hook)


def _run(report_to: int, job: dict[str, Any]) -> None:
    """Defines what the answer defines, then runs the tests on it, and reports."""
    # Taken before the answer can replace them.
    write, leave, compiled, execute = os.write, os._exit, compile, exec
    scope: dict[str, Any] = builtins.__dict__
    originals = dict(scope)
    token, answer, tests = job.pop("token"), job["answer"], job["tests"]
    entry_point, has_check = job["entry_point"], job["has_check"]
    detail = ""
    try:
        names: dict[str, Any] = {"__name__": "answer"}
        execute(compiled(answer, "<answer>", "exec", dont_inherit=True, optimize=0), names)
        scope.clear()
        scope.update(originals)
        sys.settrace(None)
        sys.setprofile(None)
        # An answer's own `all` or `len` must not decide its tests.
        shadowing = (originals.keys() & names.keys()) - {entry_point}
        names = {name: value for name, value in names.items() if name not in shadowing}
        names["__builtins__"] = builtins
        if entry_point not in names:
            detail = f"{entry_point} is not defined"
        else:
            candidate = names[entry_point]
            execute(compiled(tests, "<tests>", "exec", dont_inherit=True, optimize=0), names)
            if has_check:
                names["check"](candidate)
    except BaseException as error:
        detail = _describe(error)
    verdict = f"failed {detail}" if detail else "passed"
    write(report_to, f"{token} {verdict}\n".encode(errors="backslashreplace"))
    leave(0)


def _describe(error: BaseException) -> str:
    try:
        line = _line_of(error)
        message = " ".join(str(error).split())
        text = f"{type(error).__name__}: {message}" if message else type(error).__name__
        return f"{text[:_DETAIL_CHARACTERS]}{line}"
    except BaseException:
        return "an error that cannot be described"


def _line_of(error: BaseException) -> str:
    """Which line of the tests it was, when it was one."""
    lines = []
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f" (line {lines[-1]} of the tests)" if lines else ""


if __name__ == "__main__":
    main()
