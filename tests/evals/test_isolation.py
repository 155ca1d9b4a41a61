"""What holds without the audit hook, by the kernel's namespaces; and what does without those."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pshare_jax.errors import EvaluationError
from pshare_jax.evals import sandbox
from pshare_jax.evals.sandbox import Limits, Outcome, Program
from pshare_jax.evals.sandbox_filter import compiled_filter

SQUARE = "def solve(x):\n    return x * x\n"
TESTS = "assert solve(2) == 4\n"
LIMITS = Limits(seconds=10, cpu_seconds=2, memory_mib=256)
FOLDER = Path(sandbox.__file__).parent

HAS_NAMESPACES = (
    subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode == 0
)
needs_namespaces = pytest.mark.skipif(
    not HAS_NAMESPACES, reason="this system permits no namespaces, so there is no isolation"
)


def run(answer: str) -> Outcome:
    return sandbox.run(Program(answer + "\n" + SQUARE, TESTS, "solve"), LIMITS)


@pytest.fixture
def patched(tmp_path, monkeypatch):
    """Makes the sandbox run copies of its two files with lines added."""

    def patch(runner: str = "", isolation: str = "") -> None:
        folder = tmp_path / "evals"
        folder.mkdir()
        entry = 'if __name__ == "__main__":'
        text = (FOLDER / "sandbox_runner.py").read_text().replace(entry, f"{runner}\n{entry}")
        (folder / "sandbox_runner.py").write_text(text)
        text = (FOLDER / "sandbox_isolation.py").read_text()
        (folder / "sandbox_isolation.py").write_text(f"{text}\n{isolation}\n")
        monkeypatch.setattr(sandbox, "_RUNNER", folder / "sandbox_runner.py")
        sandbox._warn_of_no_isolation.cache_clear()

    return patch


@pytest.fixture
def unguarded(patched):
    """No audit hook: only the kernel stands between the answer and the system."""
    patched(runner="_guard = lambda folder, isolated: None")


@needs_namespaces
def test_the_system_is_isolated(caplog):
    assert run("").passed
    assert caplog.messages == []


@needs_namespaces
def test_the_users_files_cannot_be_read(unguarded, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("key")
    home = Path.home() / ".cache"
    for path in (secret, home, Path(__file__), "/etc/passwd", "/var", "/sys"):
        detail = run(f"import os\nos.stat({str(path)!r})").detail
        assert "No such file or directory" in detail, path


@needs_namespaces
@pytest.mark.parametrize(
    "action",
    [
        "open('/x', 'w')",
        "open('/usr/x', 'w')",
        "import os\nopen(os.__file__, 'a')",
        "import os\nos.mkdir(os.path.dirname(os.getcwd()) + '/x')",
        "import os\nos.mkfifo('/x')",
        "import os\nos.symlink('a', '/usr/x')",
        "import sqlite3\nsqlite3.connect('/usr/x').execute('create table a (b)')",
    ],
)
def test_nothing_but_the_working_folder_can_be_written(unguarded, action):
    detail = run(action).detail
    reasons = ("Read-only file system", "ermission", "not permitted", "unable to open database")
    assert any(reason in detail for reason in reasons), detail


@needs_namespaces
@pytest.mark.parametrize(
    "action",
    [
        "os.chroot('.')",
        "os.mknod('disk', 0o660 | stat.S_IFBLK, os.makedev(8, 0))",
        "os.setuid(0)",
        "os.setgroups([0])",
        "os.sethostname('x') if hasattr(os, 'sethostname') else socket.sethostname('x')",
        "failing(libc.mount(b'none', b'/', None, 4096, None))",
        "failing(libc.umount2(b'/proc', 2))",
        "failing(libc.mount(b'none', b'/usr', None, 4096 | 32, None))",
        "failing(libc.ptrace(16, 1, 0, 0))",
    ],
)
def test_there_are_no_privileges(unguarded, action):
    prelude = (
        "import ctypes, os, socket, stat\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def failing(code):\n    if code: raise PermissionError(os.strerror(ctypes.get_errno()))\n"
    )
    detail = run(prelude + action).detail
    assert detail.startswith("PermissionError"), detail


@needs_namespaces
def test_the_capabilities_are_gone_and_cannot_be_had_again(unguarded):
    answer = (
        "import os\nos.geteuid() or 1/0\nlines = open('/proc/self/status').read().splitlines()\n"
        "values = dict(line.split(':', 1) for line in lines)\n"
        "assert int(values['CapEff'], 16) == int(values['CapPrm'], 16) == 0\n"
        "assert values['NoNewPrivs'].strip() == '1'\n"
    )
    outcome = run(answer)
    # Containers may hide parts of /proc; then there is none.
    assert outcome.passed or "No such file or directory: '/proc/self/status'" in outcome.detail


@needs_namespaces
def test_no_port_of_this_machine_can_be_reached(unguarded):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        detail = run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))").detail
    # By the filter of system calls, or for want of a network.
    reasons = ("Operation not permitted", "Network is unreachable", "Connection refused")
    assert any(reason in detail for reason in reasons), detail


@needs_namespaces
def test_processes_of_others_do_not_exist(unguarded):
    assert "No such process" in run(f"import os\nos.kill({os.getpid()}, 0)").detail


@needs_namespaces
def test_what_an_answer_starts_ends_with_it(unguarded, tmp_path):
    mark = f"sleep-{os.getpid()}"
    answer = (
        "import os\nif os.fork() == 0:\n    os.setsid()\n"
        f"    os.execv('/usr/bin/sleep', ['{mark}', '60'])\n"
    )
    run(answer)
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert mark not in processes.stdout


@needs_namespaces
def test_the_working_folder_is_small(unguarded):
    answer = "for i in range(100):\n    open(str(i), 'wb').write(bytes(4 << 20))"
    assert "No space left on device" in run(answer).detail


@needs_namespaces
def test_a_database_of_its_own_is_an_answers_business():
    answer = "import sqlite3\nsqlite3.connect('a.db').execute('create table a (b)')"
    assert run(answer).passed


NEVER_ISOLATED = "def isolate(folder, user, group):\n    return False"
"""A system that permits no namespaces."""

AS_ANYBODY = "_refuse_root = lambda isolated: None"

HOOK_ALONE = (
    "_isolate = isolate\ndef isolate(folder, user, group):\n"
    "    _isolate(folder, user, group)\n    return False"
)
"""The hook as it is without isolation, whoever runs the tests."""


def test_root_is_refused_without_isolation(patched):
    patched(runner="os.geteuid = lambda: 0", isolation=NEVER_ISOLATED)
    with pytest.raises(EvaluationError, match="answers do not run as root without isolation"):
        run("")


@needs_namespaces
def test_no_answer_ever_runs_as_root(unguarded):
    assert run("import os\nassert os.getuid() != 0 and os.getegid() != 0").passed


CALLS = {
    "a program": "os.execv('/bin/true', ['true'])",
    "a process": "os.fork()",
    "a subprocess": "subprocess.run(['true'])",
    "a socket": "socket.socket()",
    "a pair of sockets": "socket.socketpair()",
    "a device": "os.mknod('x', 0o600)",
    "a named pipe": "os.mkfifo('x')",
    "another root": "os.chroot('.')",
    "a mount": "call(libc.mount(b'none', b'.', b'tmpfs', 0, None))",
    "a namespace": "call(libc.unshare(0x10000000))",
    "tracing": "call(libc.ptrace(0, 0, 0, 0))",
    "a key": "call(libc.syscall({keyctl}, 0, 0, 0, 0))",
    "another user": "os.setuid(1)",
    "a ring": "call(libc.syscall({io_uring_setup}, 1, 0))",
    "a program of the kernel": "call(libc.syscall({bpf}, 0, 0, 0))",
}


@needs_namespaces
@pytest.mark.skipif(compiled_filter() is None, reason="this system has no libseccomp")
@pytest.mark.parametrize("what", CALLS)
def test_what_the_kernel_denies_by_itself(unguarded, what):
    import pyseccomp

    prelude = (
        "import ctypes, os, socket, subprocess\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def call(code):\n    if code < 0: raise PermissionError(os.strerror(ctypes.get_errno()))\n"
    )
    arch = pyseccomp.system_arch()
    numbers = {n: pyseccomp.resolve_syscall(arch, n) for n in ("keyctl", "io_uring_setup", "bpf")}
    outcome = run(prelude + CALLS[what].format(**numbers))
    assert outcome.detail.startswith("PermissionError"), outcome.detail
    assert "Operation not permitted" in outcome.detail


@needs_namespaces
@pytest.mark.skipif(compiled_filter() is None, reason="this system has no libseccomp")
def test_threads_and_files_are_not_denied(unguarded):
    answer = (
        "import threading, tempfile, os, json, time\nfound = []\n"
        "threads = [threading.Thread(target=found.append, args=(i,)) for i in range(8)]\n"
        "[t.start() for t in threads]\n[t.join() for t in threads]\n"
        "assert sorted(found) == [*range(8)]\n"
        "with tempfile.TemporaryFile() as file:\n    file.write(b'x')\n"
        "os.mkdir('d'); os.rename('d', 'e'); os.rmdir('e'); time.sleep(0.001)\n"
    )
    assert run(answer) == Outcome(True, "all tests pass")


def test_without_libseccomp_it_is_said_and_goes_on(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    compiled_filter.cache_clear()
    try:
        assert run("").passed
    finally:
        compiled_filter.cache_clear()
    assert any(m.startswith("answers run without a filter of system") for m in caplog.messages)


@pytest.mark.parametrize("module", ["sqlite3", "dbm.gnu", "dbm.ndbm"])
def test_without_isolation_there_are_no_silent_writers(patched, module):
    patched(runner=AS_ANYBODY, isolation=HOOK_ALONE)
    assert "may not be imported here" in run(f"import {module}").detail


def test_without_isolation_it_is_said_once(patched, caplog):
    patched(runner=AS_ANYBODY, isolation=HOOK_ALONE)
    assert run("").passed
    assert run("").passed
    (line,) = caplog.messages
    assert line.startswith("answers run without namespaces, which this system does not permit")
