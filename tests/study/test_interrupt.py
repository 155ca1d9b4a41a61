"""Ctrl-C lets the trainer save its checkpoint, and says how to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

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
import signal, sys
# What a shell starts in the background ignores SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
from pshare_jax.study import __main__, runner

trainer, folder = sys.argv[1:]
runner.Study.make = lambda self: runner.run_trainer([sys.executable, "-c", trainer, folder])
folders = [f"--folder={folder}", f"--results={folder}"]
sys.exit(__main__.main(["run", "--base=b", "--tasks=[]", "--runs=[]", *folders]))
"""


@pytest.mark.parametrize("whom", ["the group, as a terminal does", "the study"])
def test_an_interrupted_trainer_saves_first(tmp_path, whom):
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
        else:
            os.killpg(study.pid, signal.SIGINT)
        _, stderr = study.communicate(timeout=60)
    finally:
        # The trainer too; nothing is left of the group when all went well.
        try:
            os.killpg(study.pid, signal.SIGKILL)
            left = True
        except ProcessLookupError:
            left = False
    assert stderr == "pshare_jax.study: stopped; the same command goes on from there\n"
    assert study.returncode == 130
    assert (tmp_path / "saved").exists()
    assert not left


@pytest.mark.parametrize(("code", "stopped"), [(130, True), (2, False)])
def test_a_trainer_that_was_stopped_itself(code, stopped):
    from pshare_jax.study.runner import run_trainer

    command = [sys.executable, "-c", f"raise SystemExit({code})"]
    if stopped:
        with pytest.raises(KeyboardInterrupt):
            run_trainer(command)
    else:
        assert run_trainer(command) == code
