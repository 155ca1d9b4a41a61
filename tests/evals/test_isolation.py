"""What holds without the audit hook, by the kernel's namespaces; and what does without those."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from pshare_jax.errors import EvaluationError
from pshare_jax.evals import sandbox
from pshare_jax.evals.sandbox import Limits, Outcome, Program

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
    reasons = ("Read-only file system", "Permission denied", "unable to open database file")
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
    assert "Network is unreachable" in detail or "Connection refused" in detail


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

HOOK_ALONE = (
    "_isolate = isolate\ndef isolate(folder, user, group):\n"
    "    _isolate(folder, user, group)\n    return False"
)
"""The hook as it is without isolation, whoever runs the tests."""


def test_no_answer_ever_runs_as_root(patched, caplog):
    patched(isolation=NEVER_ISOLATED)
    try:
        outcome = run("import os\nassert os.geteuid() != 0 and os.getegid() != 0")
    except EvaluationError as error:
        refused = str(error)
        outcome = None
    if outcome is None:
        assert os.geteuid() == 0
        assert "answers do not run as root, and another user cannot read this Python" in refused
    else:
        assert outcome.passed
        assert caplog.messages[0].startswith("answers run without namespaces")


@pytest.mark.parametrize("module", ["sqlite3", "dbm.gnu", "dbm.ndbm"])
def test_without_isolation_there_are_no_silent_writers(patched, module):
    patched(isolation=HOOK_ALONE)
    assert "may not be imported here" in run(f"import {module}").detail


def test_without_isolation_it_is_said_once(patched, caplog):
    patched(isolation=HOOK_ALONE)
    assert run("").passed
    assert run("").passed
    (line,) = caplog.messages
    assert line.startswith("answers run without namespaces, which this system does not permit")
