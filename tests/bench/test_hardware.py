"""`bench hardware`: all of it on a CPU in seconds; what fails is reported, and the others go on."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.bench.__main__ import main
from pshare_jax.bench.hardware import device, kernels, oracle, parts, report, run, torch_attention
from pshare_jax.bench.hardware.random_models import random_weights, weight_bytes
from pshare_jax.bench.hardware.scale import FULL, SHAPE_1B, SHAPE_8B, TINY
from pshare_jax.errors import ConfigError
from pshare_jax.kernels.paged_attention.api import paged_attention
from pshare_jax.models.weights import weight_specs
from tests.serve.server import eventually


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The command's figures and tables, of all parts."""
    folder = tmp_path_factory.mktemp("hardware")
    # At tiny sizes both models are the same.
    names = [name for name in parts.PARTS if name != "serve-1b"]
    arguments = ["hardware", "--scale=tiny", "--in_process=true", f"--parts={names}"]
    files = [f"--json={folder / 'figures.json'}", f"--markdown={folder / 'tables.md'}"]
    assert main([*arguments, *files]) == 0
    return json.loads((folder / "figures.json").read_text()), (folder / "tables.md").read_text()


def test_every_part_runs_on_a_cpu(result):
    figures, tables = result
    assert list(figures["parts"]) == [name for name in parts.PARTS if name != "serve-1b"]
    status = {name: (part["status"], part["error"]) for name, part in figures["parts"].items()}
    assert status.pop("torch")[0] == parts.SKIPPED
    assert set(status.values()) == {(parts.OK, None)}
    assert figures["device"]["platform"] == "cpu"
    for name in figures["parts"]:
        assert f"\n### {parts.PARTS[name].title}\n" in tables
    assert "nothing of speed" in tables


def test_kernels_are_compared_with_the_definition(result):
    found = result[0]["parts"]["kernels"]["figures"]
    assert found["wrong"] == []
    assert set(found["correct"]) == {"paged_attention", "shared_prefix_attention"}
    assert all(error < 1e-3 for error in found["correct"].values())
    assert {rate["what"] for rate in found["rates"]} == {
        "decode attention",
        "decode attention, one shared context",
        "prefill attention",
        "writing KV, one token a row",
    }
    assert all("error" not in rate and rate["us"] > 0 for rate in found["rates"])


def test_serving_counts_what_a_step_must_read(result):
    found = result[0]["parts"]["serve-8b"]["figures"]
    assert found["compiles"] == 0
    model, item = TINY.large, 4
    kv = 2 * model.num_layers * model.num_kv_heads * model.head_dim * item * TINY.context
    assert found["weight_bytes"] == weight_bytes(model, jnp.float32)
    # Each row's own context; then one for all.
    assert [row["least_bytes"] - found["weight_bytes"] for row in found["decode"]] == [
        kv * TINY.batch,
        kv,
    ]
    assert all(row["of_bandwidth"] is None for row in found["decode"])


def test_isolated_agents_compute_every_context_anew(result):
    found = result[0]["parts"]["agents"]["figures"]
    shared, isolated = found["shared"], found["isolated"]
    # The second agent's call finds all but what was appended, and what the first has answered.
    appended = TINY.appended + TINY.reply
    assert shared["computed_tokens"] <= TINY.sessions * (TINY.context + appended)
    assert isolated["computed_tokens"] == TINY.sessions * (2 * TINY.context + appended - 2)
    assert shared["other_model_tokens"] > 0
    assert isolated["other_model_tokens"] == 0
    assert found["most"] == isolated["computed_tokens"] / shared["computed_tokens"]


def test_a_handoff_and_the_codec_move_whole_pages(result):
    handoff = result[0]["parts"]["handoff"]["figures"]
    model = TINY.large
    page = 2 * model.num_layers * model.num_kv_heads * model.head_dim * TINY.page_size * 4
    assert handoff["bytes"] == TINY.pages * page
    assert {"gather", "checksum", "scatter", "to host", "to device from host", "whole"} <= set(
        handoff["gb_s"]
    )
    for codec in result[0]["parts"]["codec"]["figures"].values():
        assert codec["ratio"] > 1
        assert {"encode", "decode"} <= set(codec["device"])


def test_a_wrong_kernel_fails_its_part_and_is_named():
    case = oracle.CASES["decode"]
    attend = jax.jit(functools.partial(paged_attention, backend="xla"))
    right = oracle.attention_error(case, "float32", attend)
    assert right < oracle.TOLERANCE["float32"]
    # Row 0 has no query: what stands there is not compared, but must be a number.
    beside = oracle.attention_error(case, "float32", lambda *a: attend(*a).at[0, 0, 0, 0].add(1.0))
    assert beside == right
    off = oracle.attention_error(case, "float32", lambda *a: 1.01 * attend(*a))
    assert off == pytest.approx(0.01, rel=0.01)
    assert oracle.attention_error(case, "float32", lambda q, *_: np.nan * q) == float("inf")
    table = {"kernels": parts.Part("", lambda _, keep: keep("wrong", ["a kernel"]), 1)}
    found = parts.measure("kernels", TINY, lambda _: None, table)
    assert (found["status"], found["error"]) == (parts.FAILED, "a kernel")


def test_what_is_wrong_is_said_of_each_kernel(monkeypatch):
    monkeypatch.setattr(kernels, "attention_error", lambda case, dtype, attend: float("nan"))
    _, wrong = kernels.check("xla")
    assert len(wrong) == 2 * len(oracle.CASES)
    assert wrong[0] == "paged_attention, decode, float32: relative error nan"


@pytest.mark.parametrize(
    ("body", "status", "error", "figures"),
    [
        ("keep('a', 1)", "ok", None, {"a": 1}),
        ("keep('a', 1); raise ValueError('no\\nroom')", "failed", "ValueError: no room", {"a": 1}),
        ("keep('a', 1); os.abort()", "failed", "ended with code -6: ", {"a": 1}),
        ("import no_such_package", "skipped", "needs the package no_such_package", {}),
        ("keep('a', 1); signal.pause()", "failed", "was ended after 90 s: begun", {"a": 1}),
    ],
    ids=["well", "error", "crash", "package", "hangs"],
)
def test_a_part_ends_alone(body, status, error, figures, tmp_path, monkeypatch):
    """As processes of their own, which may crash or hang; what they had by then is kept."""
    program = tmp_path / "part.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import os, signal, sys
            from pshare_jax.bench.hardware import parts

            def part(scale, keep):
                print("begun", flush=True)
                {body}

            table = {{"codec": parts.Part("", part, 0)}}
            parts.measure("codec", None, parts.writer(sys.argv[3]), table)
            """
        )
    )
    monkeypatch.setattr(run, "LEAST_SECONDS", 0)
    real = run.subprocess.Popen

    def popen(command, **options):
        process = real([sys.executable, str(program), *command[-3:]], **options)
        wait, file = process.wait, Path(command[-1])

        def until_it_hangs(timeout=None):
            if timeout is None or "pause" not in body:
                return wait()
            eventually(file.is_file)
            raise subprocess.TimeoutExpired(command, timeout)

        process.wait = until_it_hangs
        return process

    monkeypatch.setattr(run.subprocess, "Popen", popen)
    found = run._run_part("codec", "tiny", 100, in_process=False)
    assert (found["status"], found["figures"]) == (status, figures)
    assert found["error"] == error or found["error"].startswith(error)


def test_no_part_begins_without_time():
    found = run._run_part("codec", "tiny", 1.0, in_process=False)
    assert (found["status"], found["error"]) == (parts.SKIPPED, "no time is left")


def test_the_process_of_a_part_writes_its_figures(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(parts, "PARTS", {"codec": parts.Part("", lambda *a: a[1]("x", 2), 1)})
    parts._main("codec", "tiny", str(tmp_path / "figures.json"))
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found == {"status": "ok", "figures": {"x": 2}, "error": None}
    assert ran == []
    assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ["kernel"]}, "parts: unknown 'kernel'; choose from kernels, torch, "),
        ({"scale": "huge"}, "scale: unknown 'huge'; choose auto, full or tiny"),
    ],
)
def test_names_are_checked_first(options, message):
    with pytest.raises(ConfigError, match=message):
        run.run(run.HardwareOptions(**options))


def test_a_failed_part_is_in_the_report_and_in_the_exit_code():
    error = {"what": "decode attention", "backend": "pallas_gpu", "error": "does not compile"}
    result = {
        "device": device.describe(),
        "scale": "full",
        "machine": {},
        "parts": {
            "kernels": {"status": "failed", "error": "was ended", "figures": {"rates": [error]}},
            "agents": {"status": "skipped", "error": "no time is left", "figures": {}},
        },
    }
    assert run.failed(result)
    text = "\n".join(report.lines(result))
    assert "failed: was ended" in text
    assert "| decode attention | pallas_gpu | - | - | - | does not compile |" in text
    assert "skipped: no time is left" in text
    del result["parts"]["kernels"]
    assert not run.failed(result)


@pytest.mark.parametrize(
    ("kind", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 3352e9),
        ("NVIDIA H200", 4800e9),
        ("NVIDIA A100-SXM4-80GB", 2039e9),
        ("TPU v5 lite", 819e9),
        ("TPU v5p", 2765e9),
        ("TPU v6e", 1640e9),
    ],
)
def test_published_figures_are_found_by_the_kind_of_device(kind, bandwidth):
    found = device.published(kind)
    assert found is not None
    assert found.bandwidth == bandwidth


def test_an_unknown_device_has_none():
    assert device.published("cpu") is None


def test_what_does_not_fit_is_skipped(monkeypatch):
    monkeypatch.setattr(device, "memory_bytes", lambda: 2**34)
    device.need_memory(2**33)
    with pytest.raises(device.SkippedError, match="needs 32 GiB, JAX may use 16 GiB here"):
        device.need_memory(2**35)


def test_the_models_have_their_names_sizes():
    assert weight_bytes(SHAPE_1B, jnp.bfloat16) == 2 * 1_235_814_400
    assert weight_bytes(SHAPE_8B, jnp.bfloat16) == 2 * 8_030_261_248
    assert FULL.large is SHAPE_8B


def test_random_weights_are_those_of_their_seed():
    specs = weight_specs(TINY.small)
    here = device.mesh().devices.item()
    from jax.sharding import SingleDeviceSharding

    places = dict.fromkeys(specs, SingleDeviceSharding(here))
    one, same = (random_weights(TINY.small, 3, jnp.float32)(places) for _ in range(2))
    other = random_weights(TINY.small, 4, jnp.float32)(places)
    assert {name: array.shape for name, array in one.items()} == {
        name: spec.shape for name, spec in specs.items()
    }
    name = "layers.0.mlp.down.kernel"
    np.testing.assert_array_equal(one[name], same[name])
    assert not np.array_equal(one[name], other[name])
    assert float(jnp.std(one[name])) == pytest.approx(TINY.small.intermediate_size**-0.5, rel=0.1)


def test_without_pytorch_its_part_is_skipped():
    with pytest.raises(device.SkippedError, match="PyTorch"):
        torch_attention.run(TINY, lambda *_: None)
