"""Runs one untrusted program and its tests; `sandbox.py` starts it, in a process of its own.

A script that imports nothing but the standard library. It is handed a file descriptor to report on
and, on standard input, a JSON object: `token` (proves that a report is its own), `answer`, `tests`,
`entry_point`, `has_check` (whether the tests define a function `check` of the candidate), `filter`
(see sandbox_filter.py, in base 64), and the limits. What it protects from, and what not, is in
docs/evaluation.md.
"""

from __future__ import annotations

import base64
import builtins
import ctypes
import json
import os
import resource
import runpy
import signal
import sys
from typing import Any

_NOBODY = 65534
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
_NOT_AGAIN = {"posix", "_posixsubprocess", "_ctypes"}
"""Modules whose calls are replaced: one removed from `sys.modules` would come back whole."""

_SILENT_WRITERS = {"_sqlite3", "_dbm", "_gdbm"}
"""Modules that write files without an audit event; harmless where the file system is another."""

_DETAIL_CHARACTERS = 200


def main() -> None:
    """Limits, isolates and runs; never returns."""
    report_to = int(sys.argv[1])
    job = json.loads(sys.stdin.buffer.read())
    isolation = _load("sandbox_isolation")
    rules = base64.b64decode(job.pop("filter"))
    is_root = os.geteuid() == 0
    user, group = (_NOBODY, _NOBODY) if is_root else (os.geteuid(), os.getegid())
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(job["seconds"] + 1)
    folder = os.path.realpath(".")
    _end_with_parent()
    isolated = isolation["isolate"](folder, user, group)
    if is_root:
        _refuse_root(isolated)
        _become_nobody()
    isolation["drop_capabilities"]()
    _end_with_parent()
    _limit(job)
    if rules:
        isolation["filter_calls"](rules)
    null = os.open(os.devnull, os.O_RDWR)
    state = "isolated" if isolated else "guarded"
    os.write(report_to, f"{job['token']} ready {state}\n".encode())
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    _guard(folder, isolated)
    _run(report_to, job)


def _load(name: str) -> dict[str, Any]:
    """The functions of a file beside this one; nothing of it stays where an answer can find it."""
    return runpy.run_path(os.path.join(os.path.dirname(os.path.realpath(__file__)), f"{name}.py"))


def _end_with_parent() -> None:
    # Forgotten when a process changes its user, so it comes after that.
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _refuse_root(isolated: bool) -> None:
    """Root without isolation: the audit hook alone would stand between an answer and the machine.

    To be another user would not help enough: what `nobody` may read and fill is the machine's.
    """
    if not isolated:
        sys.exit(
            "answers do not run as root without isolation; permit namespaces (CAP_SYS_ADMIN, or "
            "unprivileged user namespaces), or run as another user"
        )


def _become_nobody() -> None:
    """From root to a user who owns nothing. No answer ever runs as root."""
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


def _guard(folder: str, isolated: bool) -> None:
    """Denies sockets, processes and changes of files outside `folder`. Hooks cannot be removed."""
    unwanted = _NOT_AGAIN if isolated else _NOT_AGAIN | _SILENT_WRITERS
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
        elif event == "import" and arguments[0] in unwanted:
            raise PermissionError(f"{arguments[0]} may not be imported here")

    _replace_silent_calls()
    sys.addaudithook(hook)


def _replace_silent_calls() -> None:
    """Denies what raises no audit event, in modules that cannot be had anew."""
    import _posixsubprocess
    import posix

    def denied(what: str) -> Any:
        def call(*_: Any, **__: Any) -> None:
            raise PermissionError(f"{what} may not be used here")

        return call

    _posixsubprocess.fork_exec = denied("processes")
    for name in ("mkfifo", "mknod", "chroot", "pivot_root", "unshare", "setns"):
        if hasattr(posix, name):
            setattr(posix, name, denied(name))
            setattr(os, name, denied(name))


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
