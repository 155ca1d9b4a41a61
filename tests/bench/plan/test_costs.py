"""Costs: rooflines by hand, tables from measurements that are known to the last digit."""

import json
from dataclasses import replace

import pytest

from pshare_jax.bench.accelerators import ACCELERATORS
from pshare_jax.bench.compile_models import MODELS
from pshare_jax.bench.plan import costs
from pshare_jax.bench.plan.calibrate import read_results, table_costs
from pshare_jax.bench.plan.costs import Efficiency, Line, Roofline, at_size
from pshare_jax.errors import ConfigError

LLAMA = MODELS["Llama-3.1-8B"]
IDEAL = Efficiency(1.0, 1.0, 1.0, 0.0, 0.0)


def test_sizes_of_llama_8b():
    assert costs.kv_bytes(LLAMA) == 128 * 1024
    # 8.03e9 parameters in bfloat16; norms are left out.
    assert costs.weight_bytes(LLAMA) == pytest.approx(2 * 8.03e9, rel=1e-3)
    # q, o: 8,192 and 8,192; k, v: 5,120 each; three of the MLP: 18,432 each; times rank and layers.
    assert costs.lora_bytes(LLAMA, 16) == 2 * 16 * 32 * (2 * 8192 + 2 * 5120 + 3 * 18432)


def test_rooflines_by_hand():
    h100 = ACCELERATORS["h100"]
    one = Roofline(h100, IDEAL, LLAMA)
    read = 2 * (6979321856 + 128256 * 4096) + 32 * 4096 * 128 * 1024
    assert one.decode_step(32, 32, 32 * 4096) == pytest.approx(read / 3352e9)
    # The floor that `bench compile` gives for the same step, by XLA's shapes.
    assert one.decode_step(32, 32, 32 * 4096) == pytest.approx(9.60e-3, rel=2e-3)
    assert one.chunk(512, 512, 4096 - 512) == pytest.approx(8.27e-3, rel=2e-3)
    assert one.send(4) == pytest.approx(4 * 64 * 128 * 1024 / 450e9)
    assert one.send(0) == one.receive(0) == 0


def test_meshes_pay_for_collectives():
    v6e = ACCELERATORS["v6e:2x4"]
    latency = Efficiency(1.0, 1.0, 1.0, 0.0, 1e-5)
    one, four = Roofline(v6e, IDEAL, LLAMA), Roofline(v6e, latency, LLAMA, devices=4)
    wire = 2 * 8 * 4096 * 2 * 0.75 / 400e9
    expected = one.decode_step(8, 8, 8000) / 4 + 64 * (1e-5 + wire)
    assert four.decode_step(8, 8, 8000) == pytest.approx(expected)


def test_between_and_beyond_measured_sizes():
    lines = {8: Line(2.0, 0.2), 16: Line(4.0, 0.3)}
    assert at_size(lines, 12) == Line(3.0, 0.25)
    assert at_size(lines, 32) == Line(8.0, pytest.approx(0.5))
    assert at_size(lines, 1).base == pytest.approx(0.25)
    assert at_size({8: Line(1.0, 0.0)}, 99) == Line(1.0, 0.0)


def micro(contexts: dict[int, dict[int, float]], chunk: int = 128, **options) -> list[dict]:
    """Results of `bench micro` for steps of 2 ms + 1 us a token of KV, of `batch` more ms a row,
    and chunks of 10 ms + 1 us a token seen."""

    def rates(rate: float) -> dict[str, float]:
        return {"median": rate, "low": rate / 2, "high": rate * 2}

    def prefill(length: int) -> float:
        seconds, start, cover = 2e-3 + 1e-3 + 1e-6 * length, 0, length - 1
        while start < cover:
            end = min(start + chunk, cover)
            seconds += 10e-3 + 1e-6 * (start + (end - start + 1) / 2)
            start = end
        return length / seconds

    return [
        {
            "options": {
                "context": context,
                "chunk": chunk,
                "page_size": 16,
                "window": 16,
                "repeats": 5,
            },
            "prefill": {str(n): rates(prefill(n)) for n in (512, 2048)},
            "decode": {str(batch): rates(rate) for batch, rate in batches.items()},
        }
        for context, batches in contexts.items()
    ]


def step_rates(context: int) -> dict[int, float]:
    reached = context + 40
    return {b: b / (2e-3 + 1e-3 * b + 1e-6 * b * reached) for b in (1, 8)}


RESULTS = micro({64: step_rates(64), 1024: step_rates(1024)})


def test_known_costs_are_found_again():
    table = table_costs(RESULTS)
    assert table.steps[8].base == pytest.approx(10e-3, rel=1e-6)
    assert table.steps[1].slope == pytest.approx(1e-6, rel=1e-6)
    assert table.chunks[128].base == pytest.approx(10e-3, rel=1e-3)
    assert table.chunks[128].slope == pytest.approx(1e-6, rel=1e-3)
    assert table.decode_step(8, 5, 5000) == pytest.approx(15e-3)
    # A chunk of one token is taken for a step; 32 lie between 1 and 128.
    share = 31 / 127
    assert table.chunk(32, 32, 0) == pytest.approx(3e-3 + share * 7e-3 + 16.5e-6, rel=1e-3)
    twice = replace(table_costs(RESULTS, "high"), token_seconds=1e-3)
    assert twice.decode_step(8, 5, 5000) == pytest.approx(7.5e-3 + 5e-3)


def test_kernels_that_compute_no_padding_are_charged_for_none():
    exact = table_costs([result | {"backend": "cpu_ffi"} for result in RESULTS])
    padded = table_costs([result | {"backend": "xla"} for result in RESULTS])
    assert padded.chunk(128, 65, 0) == pytest.approx(10e-3 + 33e-6, rel=1e-3)
    assert exact.chunk(128, 65, 0) == pytest.approx(3e-3 + 64 / 127 * 7e-3 + 33e-6, rel=1e-3)
    assert padded.decode_step(8, 3, 3000) == pytest.approx(10e-3 + 3e-3)
    assert exact.decode_step(8, 3, 3000) == pytest.approx(5e-3 + 3e-3)
    with pytest.raises(ConfigError, match=r"several kernel backends: \['cpu_ffi', 'xla'\]"):
        table_costs([RESULTS[0] | {"backend": "cpu_ffi"}, RESULTS[1]])


def test_too_little_was_measured():
    with pytest.raises(ConfigError, match="decode of size 1 needs at least 2 contexts"):
        table_costs(RESULTS[:1])
    with pytest.raises(ConfigError, match="measure some with --lora_rank"):
        table_costs(RESULTS, lora=True)


def test_several_contexts_and_lora_modules_in_one_result():
    several = {
        **RESULTS[0],
        "options": {**RESULTS[0]["options"], "contexts": [64, 1024]},
        "decode": {"64": RESULTS[0]["decode"], "1024": RESULTS[1]["decode"]},
    }
    steps = table_costs(RESULTS).steps
    assert table_costs([several]).steps == steps
    rate = several["decode"]["64"]["8"]["median"]
    measured = several | {"lora": {"several modules": {"median": rate / 1.25}}}
    slower = table_costs([measured], lora=True).steps
    assert slower[8].base == pytest.approx(1.25 * steps[8].base)
    assert slower[1].slope == pytest.approx(1.25 * steps[1].slope)


def test_files_that_are_no_results(tmp_path):
    with pytest.raises(ConfigError, match="name result files"):
        read_results([])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_results([str(tmp_path / "none.json")])
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"runs": []}))
    with pytest.raises(ConfigError, match="no result of `bench micro`"):
        read_results([str(other)])
