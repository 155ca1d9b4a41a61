"""Ctrl-C lets the trainer save its checkpoint, and says how to go on; SIGKILL lets it save, too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pshare_jax.tied import tied

ROOT = Path(__file__).parents[2]
STOPPED = "pshare_jax.study: stopped; the same command goes on from there\n"

# Stops as the trainer does, and takes longer for its checkpoint than `subprocess.run` would wait.
TRAINER = """
import sys, time
from pathlib import Path
from pshare_jax.train.__main__ import _StopSignal

folder = Path(sys.argv[1])
with _StopSignal(active=True) as stop:
    (folder / "training").touch()
    while not stop.received:
        time.sleep(0.01)
    time.sleep(1.5)
    (folder / "saved").touch()
sys.exit(130)
"""

STUDY = """
import signal, sys, threading, time
# Whose end the kernel tells to the trainer one by one.
for _ in range(8):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
# What a shell starts in the background ignores SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
from pshare_jax.study import __main__, runner

trainer, folder = sys.argv[1:]
runner.Study.make = lambda self: runner.run_trainer([sys.executable, "-c", trainer, folder])
folders = [f"--folder={folder}", f"--results={folder}"]
sys.exit(__main__.main(["run", "--base=b", "--tasks=[]", "--runs=[]", *folders]))
"""


@pytest.mark.parametrize(
    ("whom", "code", "said"),
    [
        ("the group, as a terminal does", 130, STOPPED),
        ("the study", 130, STOPPED),
        ("the study, by SIGKILL", -signal.SIGKILL, ""),
    ],
)
def test_an_interrupted_trainer_saves_first(tmp_path, whom, code, said):
    study = subprocess.Popen(
        [sys.executable, "-c", STUDY, TRAINER, str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "training").exists():
            assert study.poll() is None, study.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if whom == "the study":
            study.send_signal(signal.SIGINT)
        elif whom == "the study, by SIGKILL":
            study.kill()
        else:
            os.killpg(study.pid, signal.SIGINT)
        # The trainer has the pipe, too, so this waits for both.
        _, stderr = study.communicate(timeout=60)
    finally:
        # The trainer too; nothing is left of the group when all went well.
        try:
            os.killpg(study.pid, signal.SIGKILL)
            left = True
        except ProcessLookupError:
            left = False
    assert stderr == said
    assert study.returncode == code
    assert (tmp_path / "saved").exists()
    # An orphan stays in the table until whoever has adopted it looks.
    assert not left or code < 0


@pytest.mark.parametrize(("code", "stopped"), [(130, True), (2, False)])
def test_a_trainer_that_was_stopped_itself(code, stopped):
    from pshare_jax.study.runner import run_trainer

    command = [sys.executable, "-c", f"raise SystemExit({code})"]
    if stopped:
        with pytest.raises(KeyboardInterrupt):
            run_trainer(command)
    else:
        assert run_trainer(command) == code


def test_a_command_whose_parent_has_ended_is_not_started():
    command = tied([sys.executable, "-c", "print('started')"])
    assert subprocess.run(command, capture_output=True, text=True).stdout == "started\n"
    command[command.index(str(os.getpid()))] = "2147483647"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == ""
    assert done.returncode == 1
    assert "not started, since process 2147483647 has ended" in done.stderr
