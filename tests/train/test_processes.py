"""Runs in processes of their own: killed at any moment, or several over one mesh."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from pshare_jax.train import step
from pshare_jax.train.__main__ import main
from tests.train.helpers import losses, metrics
from tests.train.test_loop import assert_same_weights

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


MAIN = "import sys; from pshare_jax.train.__main__ import main; sys.exit(main())"
FULL_DISK = """
import shutil
usage, free = shutil.disk_usage, iter([5000, 5000])
shutil.disk_usage = lambda path: usage(path)._replace(
    free=next(free, 1e9) if "points" in str(path) else 1e9
)
"""


def flags_of(base, data, held_out, output, *more: str) -> list[str]:
    """The run of `plain_run` by command line, with a checkpoint after each step."""
    return [
        f"--base={base}",
        f"--output={output}",
        "--tail=2",
        "--dtype=float32",
        f"--data.train=[{data}]",
        f"--data.eval=[{held_out}]",
        "--data.max_length=128",
        "--data.buckets=1",
        "--optimizer.learning_rate=0.01",
        "--optimizer.batch_size=8",
        "--optimizer.epochs=2",
        "--report.eval_every=3",
        "--report.peak_tflops=1",
        "--report.tensorboard=false",
        "--checkpoint.every=1",
        f"--compilation_cache_dir={ROOT / '.cache/xla-tests'}",
        *more,
    ]


def start(
    flags: list[str], devices: int = 8, before: str = "", **variables: str
) -> subprocess.Popen[str]:
    """A run in a process of its own, in which `before` comes first, with `variables` set."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.Popen(
        [sys.executable, "-c", before + MAIN, *flags],
        env=environment | variables,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return errors


def kill_when(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Stops the process once `condition` holds, sees that it still does, and kills it."""
    end = time.monotonic() + 120
    while True:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < end
        if condition():
            os.kill(process.pid, signal.SIGSTOP)
            if condition():
                break
            os.kill(process.pid, signal.SIGCONT)
        # To look all the time would take the processor from those that train.
        time.sleep(0.001)
    process.kill()
    process.communicate()


def saving(checkpoints: Path) -> bool:
    """Whether a checkpoint is being written, beside at least two that are complete."""
    names = os.listdir(checkpoints) if checkpoints.is_dir() else []
    whole = [name for name in names if name.isdigit()]
    return len(whole) >= 2 and len(whole) < len(names)


def test_killed_runs_end_with_the_same_bits(
    base, data, held_out, plain_run, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "run"
    flags = flags_of(base, data, held_out, output)
    with monkeypatch.context() as patch:
        # The cache of what is compiled is then the one that the configuration names: the same.
        patch.delenv("JAX_COMPILATION_CACHE_DIR")
        process = start(flags)
    kill_when(process, lambda: saving(output / "checkpoints"))
    first = max(line["step"] for line in metrics(output))
    process = start(flags)
    kill_when(process, lambda: len(losses(output)) > first + 1)
    assert main(flags) == 0
    assert "going on after step" in capsys.readouterr().err
    assert losses(output) == losses(plain_run.folder)
    assert_same_weights(output, plain_run.folder)


def test_a_signal_saves_and_stops(base, data, held_out, plain_run, tmp_path, capsys, monkeypatch):
    """Sent by this process to itself, while a step is computed."""
    output = tmp_path / "run"
    flags = flags_of(base, data, held_out, output)
    compute = step.Computations.gradients
    sent = False

    def interrupted(self, *arguments):
        nonlocal sent
        # Once: a second one would end the process.
        if not sent and losses(output):
            sent = True
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, *arguments)

    # One that the trainer does not take must not end the tests.
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(step.Computations, "gradients", interrupted)
            assert main([*flags, "--checkpoint.every=0"]) == 130
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert "stopped after step 3; start again to go on" in capsys.readouterr().err
    assert main(flags) == 0
    assert losses(output) == losses(plain_run.folder)
    assert_same_weights(output, plain_run.folder)


def free_address() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


def finish_all(started: Iterable[subprocess.Popen[str]]) -> list[str]:
    processes = list(started)
    try:
        return [finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_two_processes_give_the_losses_of_one_though_a_disk_is_full(
    base, data, held_out, plain_run, tmp_path
):
    """One is told by flags and the other by its environment; and the first finds no space for the
    first two checkpoints, which stops neither."""
    output = tmp_path / "run"
    coordinator = free_address()
    # Few checkpoints, since processes that wait for each other write them: of steps 4 and 8, of
    # the first evaluation, which is the best so far, and of the last step.
    seldom = ("--checkpoint.every=4", "--report.eval_every=5")
    flags = flags_of(base, data, held_out, output, "--mesh.fsdp=4", *seldom)
    by_flags = [
        f"--distributed.coordinator={coordinator}",
        "--distributed.num_processes=2",
        "--distributed.process_id=0",
    ]
    by_environment = {
        "JAX_COORDINATOR_ADDRESS": coordinator,
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "1",
    }
    errors, _ = finish_all(
        [
            start([*flags, *by_flags], devices=2, before=FULL_DISK),
            start(flags, devices=2, **by_environment),
        ]
    )
    np.testing.assert_allclose(losses(output), losses(plain_run.folder), rtol=0, atol=1e-4)
    ours, theirs = metrics(output)[-1], metrics(plain_run.folder)[-1]
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-4)
    lost = [step for step in range(1, 11) if f"checkpoint of step {step} could not be" in errors]
    assert lost == [4, 5]
    left = {int(path.name) for path in (output / "checkpoints").iterdir()}
    assert left == {8, 10}
