"""Kind code: programs that are wrong, hostile or endless neither pass nor do harm."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from pshare_jax.errors import DataError, EvaluationError
from pshare_jax.evals import programs, sandbox
from pshare_jax.evals.sandbox import Limits, Outcome, Program

SQUARE = "def solve(x):\n    return x * x\n"
TESTS = "assert solve(2) == 4\nassert solve(3) == 9\n"
QUICK = Limits(seconds=10, cpu_seconds=1, memory_mib=256)


def run(answer: str, limits: Limits = QUICK, tests: str = TESTS) -> Outcome:
    return sandbox.run(Program(answer, tests, "solve"), limits)


def test_a_right_answer_passes():
    assert run(SQUARE) == Outcome(True, "all tests pass")


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        ("def solve(x):\n    return 2 * x\n", "AssertionError (line 2 of the tests)"),
        ("def solve(x): return", "AssertionError (line 1 of the tests)"),
        ("solve = 3", "TypeError: 'int' object is not callable (line 1 of the tests)"),
        ("def other(x): return x", "solve is not defined"),
        ("def solve(", "SyntaxError: '(' was never closed (<answer>, line 1)"),
        ("", "solve is not defined"),
        ("print('passed')", "solve is not defined"),
        ("raise ValueError('\\ud800')", r"ValueError: \ud800"),
        ("input()", "EOFError: EOF when reading a line"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
    ],
)
def test_wrong_answers_say_why(answer, detail):
    assert run(answer) == Outcome(False, detail)


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (f"{SQUARE}import sys\nsys.exit(0)", "SystemExit: 0"),
        (f"{SQUARE}raise KeyboardInterrupt", "KeyboardInterrupt"),
        (f"{SQUARE}import os\nos._exit(0)", "ended before its tests did, with exit code 0"),
        ("import os\ndef solve(x):\n    os._exit(0)", "ended before its tests did"),
        ("import sys\ndef solve(x):\n    sys.exit(0)", "SystemExit: 0 (line 1 of the tests)"),
        (
            "import os\nfor fd in range(64):\n    try: os.write(fd, b'0 passed\\npassed\\n')\n"
            "    except OSError: pass\nos._exit(0)",
            "ended before its tests did, with exit code 0",
        ),
        (
            "import os\nfor fd in range(3, 64):\n    try:\n        os.close(fd)\n"
            "    except OSError:\n        pass\ndef solve(x): return x * x",
            "ended before its tests did",
        ),
    ],
)
def test_ending_early_does_not_pass(answer, detail):
    outcome = run(answer)
    assert not outcome.passed
    assert outcome.detail.startswith(detail)


@pytest.mark.parametrize(
    "answer",
    [
        "import builtins\nbuiltins.AssertionError = Warning\ndef solve(x): return 0",
        "AssertionError = None\ndef solve(x): return 0",
        "import builtins\nbuiltins.all = lambda values: True\ndef solve(x): return 0",
        "def all(values): return True\ndef solve(x): return 0",
        "__builtins__ = {'all': lambda values: True}\ndef solve(x): return 0",
        "import sys\nsys.settrace(lambda *_: sys.exit(0))\ndef solve(x): return 0",
        "import builtins\nbuiltins.compile = builtins.exec = print\ndef solve(x): return 0",
        "import os\nos.write = os._exit = print\ndef solve(x): return 0",
    ],
)
def test_replaced_builtins_do_not_decide_the_tests(answer):
    tests = "assert all(solve(x) == x * x for x in (1, 2))\n"
    assert run(answer, tests=tests) == Outcome(False, "AssertionError (line 1 of the tests)")


def test_builtins_of_its_own_are_an_answers_business():
    answer = "def sum(values): return 4\ndef solve(x): return sum([]) if x == 2 else 9\n"
    assert run(answer).passed


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("import os\nos.fork()", "os.fork"),
        ("import os\nos.system('true')", "os.system"),
        ("import subprocess\nsubprocess.run(['true'])", "subprocess.Popen"),
        ("import _posixsubprocess\n_posixsubprocess.fork_exec()", "processes may not"),
        (
            "import sys\ndel sys.modules['_posixsubprocess']\nimport _posixsubprocess",
            "_posixsubprocess may not be imported",
        ),
        ("import sys\ndel sys.modules['posix']\nimport posix", "posix may not be imported"),
        ("import os\nos.mkfifo('x')", "mkfifo may not be used"),
        ("import posix\nposix.mkfifo('x')", "mkfifo may not be used"),
        ("import os\nos.mknod('x')", "mknod may not be used"),
        ("import os\nos.chroot('.')", "chroot may not be used"),
        ("import multiprocessing\nmultiprocessing.Process(target=print).start()", "os.fork"),
        ("import os\nos.execv('/bin/true', ['true'])", "os.exec"),
        ("import os\nos.kill(os.getppid(), 9)", "os.kill"),
        ("import socket\nsocket.socket()", "socket.__new__"),
        ("import socket\nsocket.getaddrinfo('localhost', 80)", "socket.getaddrinfo"),
        ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1')", "socket"),
        ("import ctypes\nctypes.CDLL(None)", "ctypes.dlopen"),
        ("import gc\ngc.get_objects()", "gc.get_objects"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "resource"),
        ("open('/proc/self/mem', 'rb')", "/proc may not be read"),
    ],
)
def test_processes_sockets_and_the_like_are_denied(answer, reason):
    outcome = run(answer)
    assert not outcome.passed
    assert "Error" in outcome.detail
    assert reason in outcome.detail


def test_a_caught_fork_bomb_ends():
    bomb = (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    )
    assert "killed, mostly for more than 1 s of CPU time" in run(bomb).detail


def test_files_outside_stay_as_they_are(tmp_path):
    victim = tmp_path / "victim.txt"
    victim.write_text("safe")
    for action in (
        f"open({str(victim)!r}, 'w')",
        f"import os\nos.remove({str(victim)!r})",
        f"import os\nos.rename({str(victim)!r}, 'mine')",
        f"import os\nos.symlink({str(victim)!r}, 'mine')\nopen('mine', 'a')",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
        f"import os\nos.mkdir({str(tmp_path / 'new')!r})",
        f"import os\nos.open({str(tmp_path)!r}, os.O_RDONLY)",
        f"import os\nos.chdir({str(tmp_path)!r})\nos.remove('victim.txt')",
        f"import os\nos.chmod(open({str(victim)!r}).fileno(), 0)",
    ):
        outcome = run(action)
        # Without another file system the folder is there, and it is the hook that denies.
        reasons = ("files outside the working folder may not be changed", "No such file")
        assert any(reason in outcome.detail for reason in reasons), action
    assert victim.read_text() == "safe"
    assert list(tmp_path.iterdir()) == [victim]


def test_files_inside_are_its_own():
    answer = (
        "import os, tempfile\nopen('a', 'w').write('4')\nos.rename('a', 'b')\n"
        "with tempfile.NamedTemporaryFile('w') as file:\n    file.write('x')\n"
        "with tempfile.TemporaryDirectory() as folder:\n    open(folder + '/x', 'w').close()\n"
        "def solve(x): return int(open('b').read()) + 5 * (x == 3)\n"
    )
    assert run(answer).passed


def test_endless_computation_is_killed():
    assert "killed, mostly for more than 1 s of CPU time" in run("while True: pass").detail


def test_waiting_is_ended_by_the_clock():
    answer = "import os, signal, time\nos.setsid()\nsignal.alarm(0)\ntime.sleep(100)"
    limits = Limits(seconds=1, cpu_seconds=1)
    # The first process of its group may not found a session; in a namespace it is another one.
    assert run(answer, limits).detail in (
        "not done after 1 s",
        "PermissionError: [Errno 1] Operation not permitted",
    )


def test_memory_is_limited():
    assert run("hog = bytearray(10**9)").detail.startswith("MemoryError")


def test_file_size_is_limited():
    limits = Limits(file_mib=1)
    assert "File too large" in run("open('big', 'wb').write(bytes(2 << 20))", limits).detail


def test_a_flood_of_output_does_not_matter():
    assert run(f"print('x' * 10**7)\n{SQUARE}").passed


def test_a_flooded_report_does_not_pass():
    flood = (
        "import os\nfor fd in range(3, 64):\n    try:\n        os.set_blocking(fd, False)\n"
        "        while True: os.write(fd, b'passed\\n' * 1000)\n    except OSError:\n        pass\n"
    )
    assert not run(f"{flood}{SQUARE}", Limits(seconds=1)).passed


def test_the_environment_and_arguments_are_its_own(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "x")
    answer = f"import os\nassert 'SECRET_KEY' not in os.environ\n{SQUARE}"
    assert run(answer).passed


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = len(os.listdir("/proc/self/fd"))
    endless = "open('a', 'w').write('x')\nimport threading\nwhile True: pass"
    run(endless, Limits(seconds=1))
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(tmp_path) not in processes.stdout


def test_several_at_once():
    outcomes: dict[int, bool] = {}

    def work(index: int) -> None:
        outcomes[index] = run(f"def solve(x): return x ** {1 + index % 2}").passed

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {index: index % 2 == 1 for index in range(6)}


def test_a_sandbox_that_cannot_start_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(sandbox, "_RUNNER", Path("/nowhere/runner.py"))
    with pytest.raises(EvaluationError, match=r"the sandbox cannot be started: .*No such file"):
        run(SQUARE)
    with pytest.raises(EvaluationError, match="the sandbox cannot be started"):
        sandbox.check()


def test_the_check_of_the_sandbox():
    sandbox.check()


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("Sure:\n```python\ncode\n```\nand\n```python\nmore\n```", "code\n"),
        ("```py\n  code\n```", "  code\n"),
        ("```Python3 \r\ncode", "code"),
        ("def f(): pass", "def f(): pass"),
        ("```\nplain\n```", "```\nplain\n```"),
        ('```python\nx = "```"\n```', 'x = "```"\n'),
    ],
)
def test_which_code_is_run(text, source):
    assert programs.extract(text) == source


REFERENCE = {"entry_point": "solve", "tests": TESTS}
HUMAN_EVAL = {
    "prompt": 'import math\n\n\ndef root(x):\n    """The root of x."""\n',
    "entry_point": "root",
    "tests": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(4) == 2\n",
}


def test_grading_an_answer():
    assert programs.grade(REFERENCE, f"Here:\n```python\n{SQUARE}```").correct
    assert programs.grade(REFERENCE, SQUARE).correct
    wrong = programs.grade(REFERENCE, "I cannot.")
    assert not wrong.correct
    assert "SyntaxError" in wrong.detail
    assert programs.grade(REFERENCE, "x = '\ud800'").detail == "the code is not valid Unicode"


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("    return math.sqrt(x)\n", True),
        ("```python\nimport math\n\ndef root(x):\n    return math.sqrt(x)\n```", True),
        ("    return x\n", False),
        ("    pass\n", False),
        ("", False),
    ],
)
def test_human_evals_shape(text, correct):
    assert programs.grade(HUMAN_EVAL, text).correct is correct


def test_an_entry_point_named_check_is_not_called_as_humanevals():
    reference = {"entry_point": "check", "tests": "assert check(2) == 4\n"}
    assert programs.grade(reference, "def check(x): return 2 * x").correct


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("assert 1", "reference must be"),
        ({"tests": TESTS}, "reference must be"),
        ({**REFERENCE, "timeout": 3}, "timeout is not known"),
        ({**REFERENCE, "tests": ["a"]}, "must be texts"),
        ({**REFERENCE, "entry_point": "solve()"}, "'solve\\(\\)' is no name"),
        ({**REFERENCE, "tests": "assert ("}, "the tests are no valid Python"),
        ({**REFERENCE, "tests": "# none"}, "there are no tests"),
    ],
)
def test_bad_references(reference, message):
    with pytest.raises(DataError, match=message):
        programs.check_reference(reference)
