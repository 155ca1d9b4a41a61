"""The compile benchmark without the accelerators' compilers: its tables, names and errors."""

from dataclasses import asdict, replace

import pytest

from pshare_jax.bench import accelerators, compile_report
from pshare_jax.bench.accelerators import ACCELERATORS
from pshare_jax.bench.compile import (
    Compiled,
    CompileOptions,
    Outcome,
    largest_all_gather,
    outcomes,
    usable_estimate,
)
from pshare_jax.errors import ConfigError

COMPILED = Compiled(
    compile_seconds=12.3,
    weight_bytes=4 * 2**30,
    pool_bytes=8 * 2**30,
    temp_bytes=3 * 2**20,
    code_bytes=1,
    total_bytes=12 * 2**30,
    largest_pool_tokens=123456,
    pool_in_place=True,
    accessed_bytes=3e9,
    least_bytes=2e9,
    estimated_seconds=0.004,
    floor_seconds=0.0025,
)
STEP = Outcome("v6e:2x4", "Qwen3-8B", "decode step", COMPILED)


def report(*rows: Outcome) -> str:
    return compile_report.markdown(
        {"options": asdict(CompileOptions()), "outcomes": [asdict(row) for row in rows]}
    )


def test_a_step_that_compiles():
    cells = (
        "| v6e:2x4 | decode step | 4.0 GiB | 8.0 GiB | 3 MiB | 38 % | yes | 123,456 | 1.50 | 12 s "
        "| 4.00 ms | 2.50 ms |"
    )
    assert cells in report(STEP).splitlines()


def test_figures_that_are_missing_are_dashes():
    compiled = replace(COMPILED, accessed_bytes=None, estimated_seconds=None, pool_in_place=False)
    cells = "| **no** | 123,456 | - | 12 s | - | 2.50 ms |"
    assert cells in report(replace(STEP, compiled=compiled))


def test_a_refusal_is_a_row_with_its_error():
    row = replace(STEP, compiled=None, error="RESOURCE_EXHAUSTED: out of hbm")
    assert "| v6e:2x4 | decode step | RESOURCE_EXHAUSTED: out of hbm |" in report(row)
    assert compile_report.line(asdict(row)) == (
        "v6e:2x4 Qwen3-8B decode step: RESOURCE_EXHAUSTED: out of hbm"
    )


def test_a_kernel_has_a_cell_for_every_machine():
    rows = (
        Outcome("v5e:2x4", "", "a kernel", COMPILED),
        Outcome("h100", "", "a kernel", error="refused"),
    )
    assert "| a kernel | 12.3 | not compiled | not compiled | refused |" in report(*rows)


def test_largest_all_gather():
    text = """
  %a = bf16[4,128]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=1
  %b = (f32[2]{0}, f32[8,16]{1,0}) all-gather-start(%y), channel_id=2
  %c = bf16[9999,9999]{1,0} all-reduce(%z)
"""
    assert largest_all_gather(text) == 4 * 128 * 2
    assert largest_all_gather("") == 0


@pytest.mark.parametrize(
    ("given", "kept"), [(0.5, 0.5), (0.1, 0.1), (0.09, None), (-18.99, None), (None, None)]
)
def test_times_below_the_floor_are_no_estimate(given, kept):
    assert usable_estimate(given, 0.1) == kept


@pytest.mark.parametrize("option", ["accelerators", "models"])
def test_unknown_names(option, monkeypatch):
    monkeypatch.setattr(accelerators.Accelerator, "devices", lambda self: [])
    options = replace(CompileOptions(kernels=False), **{option: ["v9"]})
    with pytest.raises(ConfigError, match=f"{option}: unknown 'v9'; choose from"):
        next(outcomes(options))


@pytest.mark.parametrize("name", ACCELERATORS)
def test_a_missing_compiler_is_named(name, monkeypatch):
    monkeypatch.setattr(accelerators, "_is_installed", lambda module: False)
    with pytest.raises(ConfigError, match="is not installed; `make test-compile` sets up"):
        ACCELERATORS[name].devices()
