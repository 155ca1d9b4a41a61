"""The compile benchmark without the accelerators' compilers: its tables, names and errors."""

import json
from dataclasses import asdict, replace

import jax
import pytest

from pshare_jax.bench import accelerators, compile_report
from pshare_jax.bench import compile as compile_bench
from pshare_jax.bench.__main__ import main
from pshare_jax.bench.accelerators import ACCELERATORS
from pshare_jax.bench.compile import (
    Compiled,
    CompileOptions,
    Outcome,
    compile_program,
    largest_all_gather,
    outcomes,
    time_estimate,
)
from pshare_jax.bench.compile_programs import Sizes, bytes_per_device
from pshare_jax.bench.training_programs import training_programs
from pshare_jax.errors import ConfigError
from tests.train.helpers import MODEL

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
    hbm_bytes=2.1e9,
    least_bytes=2e9,
    estimated_seconds=0.004,
    no_estimate=None,
    floor_seconds=0.0025,
)
STEP = Outcome("v6e:2x4", "Qwen3-8B", "decode step", COMPILED)


def report(*rows: Outcome) -> str:
    return compile_report.markdown(
        {"options": asdict(CompileOptions()), "outcomes": [asdict(row) for row in rows]}
    )


def test_a_step_that_compiles():
    cells = (
        "| v6e:2x4 | decode step | 4.0 GiB | 8.0 GiB | 3 MiB | 38 % | yes | 123,456 | 1.05 | 1.50 "
        "| 12 s | 4.00 ms | 2.50 ms |"
    )
    assert cells in report(STEP).splitlines()


def test_one_chip_of_a_machine_has_rows_of_its_own():
    alone = replace(STEP, accelerator="v6e:2x4" + compile_report.ONE_CHIP)
    text = report(STEP, alone)
    assert "| v6e:2x4, one chip | decode step | 4.0 GiB | 8.0 GiB | 3 MiB | 38 % | yes |" in text
    assert "Handoff: 16 pages of 32 tokens" in text


def test_figures_that_are_missing_are_dashes_or_say_why():
    compiled = replace(
        COMPILED,
        accessed_bytes=None,
        hbm_bytes=None,
        estimated_seconds=None,
        no_estimate="the compiler gives none",
        pool_in_place=False,
    )
    cells = "| **no** | 123,456 | - | - | 12 s | none: the compiler gives none | 2.50 ms |"
    assert cells in report(replace(STEP, compiled=compiled))


@pytest.mark.parametrize(("total", "share", "fits"), [(12, "38 %", "yes"), (35, "112 %", "**no**")])
def test_a_training_step_has_its_mesh_and_says_whether_it_fits(total, share, fits):
    compiled = replace(COMPILED, pool_bytes=0, pool_in_place=None, total_bytes=total * 2**30)
    row = Outcome("v6e:2x4", "Qwen3-8B", "full: update", compiled, mesh="1 x 4 x 2")
    cells = (
        f"| v6e:2x4 | 1 x 4 x 2 | full: update | 4.0 GiB | 3 MiB | {share} | {fits} | 12 s "
        "| 4.00 ms | 2.50 ms |"
    )
    text = report(row, STEP)
    assert cells in text.splitlines()
    assert text.index("| v6e:2x4 | decode step |") < text.index("## Training") < text.index(cells)
    assert compile_report.line(asdict(row)).endswith("GiB")
    assert "not compiled in this run: Qwen3-8B on v5e:2x4, Qwen3-8B on v5p:2x2x1, Qwen" in text


def test_a_refused_training_step_is_a_row_with_its_error():
    row = Outcome("v5e:2x4", "Qwen3-8B", "full: gradients", error="out of hbm", mesh="1 x 4 x 2")
    assert "| v5e:2x4 | 1 x 4 x 2 | full: gradients | out of hbm |" in report(row)


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
    assert "| a kernel | 12.3 | not compiled | not compiled | not compiled | refused |" in report(
        *rows
    )


def test_largest_all_gather():
    text = """
  %a = bf16[4,128]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=1
  %b = (f32[2]{0}, f32[8,16]{1,0}) all-gather-start(%y), channel_id=2
  %c = bf16[9999,9999]{1,0} all-reduce(%z)
"""
    assert largest_all_gather(text) == 4 * 128 * 2
    assert largest_all_gather("") == 0


@pytest.mark.parametrize(
    ("given", "kept", "reason"),
    [
        (0.5, 0.5, None),
        (0.1, 0.1, None),
        (0.09, None, "90.00 ms is below the floor, so parts are left out"),
        (-1.99, None, "-1.99 s: about -1 s for each of 2 ConcatBitcast calls"),
        (None, None, "the compiler gives none"),
    ],
)
def test_times_below_the_floor_are_no_estimate_and_say_why(given, kept, reason):
    call = '%a = bf16[8] custom-call(%x), custom_call_target="ConcatBitcast"\n'
    assert time_estimate(given, 0.1, 2 * call) == (kept, reason)


def test_a_negative_time_without_a_known_cause_says_so():
    assert time_estimate(-1.0, 0.1, "") == (None, "-1.00 s: negative, cause unknown")


def test_rows_of_earlier_runs_are_kept_unless_compiled_anew():
    old = {"outcomes": [asdict(STEP), asdict(replace(STEP, model="Qwen3-14B"))]}
    new = {"outcomes": [asdict(replace(STEP, compiled=None, error="refused"))]}
    old |= {"jax": "0", "shared_prefix": "seen"}
    whole = compile_report.merged([old, new | {"jax": "1"}])
    assert [(row["model"], row["error"]) for row in whole["outcomes"]] == [
        ("Qwen3-8B", "refused"),
        ("Qwen3-14B", None),
    ]
    assert (whole["jax"], whole["shared_prefix"]) == ("1", "seen")


def test_an_ended_run_loses_no_row_that_was_there(tmp_path, monkeypatch):
    file = tmp_path / "compile.json"
    file.write_text(json.dumps({"outcomes": [asdict(STEP)], "shared_prefix": "seen"}))

    def interrupted(options, on_outcome):
        outcome = replace(STEP, model="Qwen3-14B")
        on_outcome(outcome, {"outcomes": [asdict(outcome)]})
        raise KeyboardInterrupt

    monkeypatch.setattr(compile_bench, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["compile", f"--merge=[{file}]", f"--json={file}"])
    kept = json.loads(file.read_text())
    assert [row["model"] for row in kept["outcomes"]] == ["Qwen3-8B", "Qwen3-14B"]
    assert kept["shared_prefix"] == "seen"


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


def test_training_programs_split_their_state_over_the_machine(monkeypatch):
    """On CPU devices: each is traced, and counts what lies in memory beside it."""
    monkeypatch.setattr(accelerators.Accelerator, "devices", lambda self: jax.devices())
    sizes = Sizes(train_prompt=16, train_answer=4)
    accelerator = ACCELERATORS["v6e:2x4"]
    programs = {p.name: p for p in training_programs(accelerator, MODEL, sizes)}
    steps = ("base KV", "gradients", "update")
    assert list(programs) == [f"{kind}: {s}" for kind in ("full", "LoRA, rank 16") for s in steps]
    for program in programs.values():
        program.function.lower(*program.arguments)

    full, lora = programs["full: update"], programs["LoRA, rank 16: update"]
    assert (full.mesh, lora.mesh) == ("1 x 4 x 2", "2 x 2 x 2")
    parameters = sum(weight.size for weight in full.arguments[0].values())
    # Masters and two moments of four bytes; norm scales are too small to be split.
    assert 12 * parameters / 8 < full.weight_bytes < 12 * parameters / 8 * 1.1
    moments = programs["full: gradients"].resident_bytes
    assert 8 * parameters / 8 < moments < 8 * parameters / 8 * 1.1
    # For LoRA the base, in bfloat16, lies beside everything.
    assert lora.resident_bytes > 2 * parameters / 4
    compiled = compile_program(accelerator, lora, MODEL.num_layers)
    assert compiled.total_bytes > lora.resident_bytes + bytes_per_device(lora.arguments)
    assert compiled.pool_in_place is None
    assert compiled.largest_pool_tokens is None
    assert all(p.least_flops > 0 for p in programs.values() if "update" not in p.name)
