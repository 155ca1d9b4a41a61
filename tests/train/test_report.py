"""What is told and counted."""

import contextlib

import numpy as np
import pytest

from pshare_jax.core.split_rule import LAST_TOKEN
from pshare_jax.errors import CheckpointError
from pshare_jax.train import flops
from pshare_jax.train.config import LoraConfig, ReportConfig
from pshare_jax.train.data import Example, Turn
from pshare_jax.train.flops import row_flops
from pshare_jax.train.layout import make_row
from pshare_jax.train.loss import LoraShape, Recipe
from pshare_jax.train.report import MetricsLog, Reporter
from tests.train.helpers import MODEL, metrics, scalars

# Multiplications and additions of a token by hand: q and o, k and v, gate and up and down.
PROJECTIONS = 2 * (2 * 48 * 64 + 2 * 48 * 32 + 3 * 48 * 64)
CONTEXT = 2 * 2 * 4 * 16
HEAD = 2 * 48 * 416
ROW = make_row(Example(np.arange(10, dtype=np.int32), (Turn(7, 10),), "file:1"), LAST_TOKEN)


def forward(positions, targets: int) -> int:
    return sum(2 * (PROJECTIONS + CONTEXT * (p + 1)) for p in positions) + HEAD * targets


def test_arithmetic_of_a_row_by_hand():
    decode, prompt, whole = forward(range(6, 9), 3), forward(range(6), 0), forward(range(9), 3)
    full = Recipe(MODEL, "float32")
    assert row_flops(full, ROW, kv_kept=True) == 3 * decode
    assert row_flops(full, ROW, kv_kept=False) == 3 * decode + prompt
    lora = Recipe(MODEL, "float32", LoraShape(2, 4.0, tuple(LoraConfig().targets)))
    assert row_flops(lora, ROW, kv_kept=True) == 2 * decode
    distilled = Recipe(MODEL, "float32", teacher=MODEL)
    assert row_flops(distilled, ROW, kv_kept=True) == 3 * decode + whole


def test_the_peak_is_of_the_products_of_the_run(monkeypatch):
    asked = []

    def product(x, kernel, *, backend):
        asked.append((x.dtype, backend))
        return x

    monkeypatch.setattr(flops, "matmul", product)
    assert flops.measure_peak("bfloat16", "cpu_ffi") > 0
    assert asked == [("bfloat16", "cpu_ffi")]


def test_lines_where_there_is_no_terminal(capsys):
    reporter = Reporter()
    reporter.start("training", 100)
    for step in range(1, 101):
        reporter.advance("training", step, 100, f"loss {step}")
    reporter.stop()
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("training 1/100  loss 1  ")
    assert first.endswith(" left")
    assert last == "training 100/100  loss 100  0:00:00 left"


def test_only_one_process_speaks(capsys):
    reporter = Reporter(active=False)
    reporter.start("training", 1)
    reporter.advance("training", 1, 1)
    reporter.say("hello")
    assert capsys.readouterr().err == ""


def test_metrics_after_the_resumed_step_are_dropped(tmp_path):
    log = MetricsLog(tmp_path, 1, ReportConfig(), warn=pytest.fail)
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 2})
    log.close()
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo\n' + whole + '{"step": 4, "lo')
    log = MetricsLog(tmp_path, 3, ReportConfig(), warn=pytest.fail)
    log.write(3, {"loss": float("nan"), "seconds": 0.25})
    log.close()
    assert metrics(tmp_path) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": None, "seconds": 0.25},
    ]
    assert scalars(tmp_path / "tensorboard") == {
        "loss": [(1, 0.5), (2, 1.0), (3, 1.5)],
        "seconds": [(3, 0.25)],
    }


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_full_disk_costs_metrics_and_nothing_else(tmp_path, tensorboard):
    warnings: list[str] = []
    log = MetricsLog(tmp_path, 1, ReportConfig(tensorboard=tensorboard), warn=warnings.append)
    if tensorboard:
        writer = log._events._writer._py_recordio_writer
        writer._writer.close()
        full = writer._writer = open("/dev/full", "ab")  # noqa: SIM115
    else:
        log._file.close()
        full = log._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    for step in range(1, 30):
        log.write(step, {"loss": 1.0})
    log.close()
    with contextlib.suppress(OSError):
        full.close()
    assert warnings == [
        f"{tmp_path}: metrics cannot be written: No space left on device; training goes on"
    ]


def test_more_than_a_day_left(capsys, monkeypatch):
    clock = iter([0.0, 3600.0])
    monkeypatch.setattr("pshare_jax.train.report.time.monotonic", lambda: next(clock))
    reporter = Reporter()
    reporter.start("training", 31)
    reporter.advance("training", 1, 31)
    assert capsys.readouterr().err == "training 1/31    1 day, 6:00:00 left\n"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(CheckpointError, match=f"{tmp_path}: cannot be written: File exists"):
        MetricsLog(tmp_path, 1, ReportConfig(), warn=pytest.fail)
