"""A trace's events become shares: of the time, and of each program's operations."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pshare_jax.bench.traces import read_profile
from pshare_jax.errors import BenchmarkError


def write(folder: Path, events: list[dict]) -> None:
    file = folder / "plugins/profile/2026_01_01/host.trace.json.gz"
    file.parent.mkdir(parents=True)
    with gzip.open(file, "wt") as out:
        json.dump({"traceEvents": events}, out)


def operation(name: str, program: str, thread: int, start: float, seconds: float) -> dict:
    times = {"ts": 1e6 * start, "dur": 1e6 * seconds}
    return {"ph": "X", "name": name, "tid": thread, "args": {"hlo_module": program}} | times


def test_shares_of_programs_and_operations(tmp_path):
    write(
        tmp_path,
        [
            {"ph": "M", "name": "thread_name", "args": {"name": "worker"}},
            {"ph": "X", "name": "a function of Python", "tid": 9, "ts": 0, "dur": 1e9},
            # Two threads at once; the loop has a product inside, whose time is not its own.
            operation("while.3", "jit_step", 1, 10, 4),
            operation("dot.12.clone", "jit_step", 1, 11, 3),
            operation("dot", "jit_step", 2, 12, 4),
            # Nothing runs from 16 to 18.
            operation("ffi_call.7", "jit_chunk", 1, 18, 2),
        ],
    )
    profile = read_profile(tmp_path)
    assert profile.seconds == pytest.approx(10)
    assert profile.idle == pytest.approx(0.2)
    assert list(profile.programs) == ["step", "chunk"]
    step, chunk = profile.programs.values()
    assert step.share == pytest.approx(0.6)
    assert step.operations == pytest.approx({"dot": 7 / 8, "while": 1 / 8})
    assert list(step.operations) == ["dot", "while"]
    assert chunk.share == pytest.approx(0.2)
    assert chunk.operations == {"ffi_call": 1}


def test_no_trace_and_no_operation(tmp_path):
    with pytest.raises(BenchmarkError, match="has no trace"):
        read_profile(tmp_path)
    write(tmp_path, [{"ph": "X", "name": "host", "ts": 0, "dur": 1}])
    with pytest.raises(BenchmarkError, match="no operation of XLA"):
        read_profile(tmp_path)
