"""The command: layouts and memory, predictions, validation, tables, plots and errors."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pshare_jax.bench.__main__ import main
from pshare_jax.bench.accelerators import ACCELERATORS
from pshare_jax.bench.compile_models import MODELS
from pshare_jax.bench.plan import served
from pshare_jax.bench.plan.costs import Efficiency
from pshare_jax.bench.plan.machines import (
    Engines,
    Layout,
    Machine,
    fit,
    isolated_layouts,
    memory_rows,
    split_layouts,
    system_spec,
)
from pshare_jax.bench.plan.predict import MachineOptions, PredictOptions, cases
from pshare_jax.engine.limits import DEFAULT_POOL_SEQUENCES
from pshare_jax.errors import ConfigError
from tests.bench.plan.test_costs import RESULTS

ROOT = Path(__file__).parents[3]


def machine(name: str, devices: int = 8) -> Machine:
    model = MODELS["Llama-3.1-8B"]
    return Machine(ACCELERATORS[name], devices, model, Efficiency(), Engines())


def fitting(name: str, models: int, modules="full") -> set[tuple[int, int, int]]:
    here = machine(name)
    layouts = split_layouts(here, models, modules, shared=True)
    found = [x for x in layouts if fit(here, x, 4096).fits]
    return {(x.prefill_mesh, x.decode_mesh, x.hosted) for x in found}


def test_what_fits_where():
    # Four full modules of 15 GiB: on one H100, but on a v6e chip of 31 GiB only one.
    assert (1, 1, 4) in fitting("h100", 4)
    assert {hosted for _, mesh, hosted in fitting("v6e:2x4", 4) if mesh == 1} == {1}
    assert (1, 4, 4) in fitting("v6e:2x4", 4)
    # Eight of them leave no room for KV on four v6e chips, whatever the layout.
    assert (1, 4, 8) not in fitting("v6e:2x4", 8)
    assert (1, 1, 8) in fitting("v6e:2x4", 8, "lora")
    # A v5e chip of 16 GiB does not hold even one, and eight chips not five.
    assert fitting("v5e:2x4", 4) == set()
    assert min(min(meshes[:2]) for meshes in fitting("v5e:2x4", 4, "lora")) == 2


def test_memory_by_mesh():
    one, two, four = memory_rows(machine("v6e:2x4"), 8, 4096)
    assert [row["most_modules"] for row in (one, two, four)] == [1, 3, 7]
    # 31.25 GiB less a tenth, less 14.96 GiB of weights, in pages of 8 MiB.
    assert one["prefill_tokens"] == pytest.approx((31.25 * 0.9 - 14.96) * 1024 / 8 * 64, rel=1e-3)
    assert one["prefill_tokens"] > one["lora_tokens"] > 0.9 * one["prefill_tokens"]
    assert [row["most_modules"] for row in memory_rows(machine("v5e:2x4"), 8, 4096)] == [0, 1, 3]


def test_layouts_divide_devices_and_models():
    layouts = list(split_layouts(machine("h100"), 4, "full", shared=True))
    assert {(x.prefill_devices, x.decode_devices) for x in layouts} == {
        (p, 8 - p) for p in range(1, 8)
    }
    for layout in layouts:
        engines = layout.decode_devices // layout.decode_mesh
        assert engines * layout.hosted >= 4
        assert 0 < layout.loaded_engines <= engines
        [server] = system_spec(machine("h100"), layout).servers
        hosts = [len([e for e in server.decode if model in e.models]) for model in range(4)]
        assert min(hosts) >= 1
        assert sum(hosts) == engines * layout.hosted
        processors = [e.processor for e in (*server.prefill, *server.decode)]
        assert len(set(processors)) == len(processors)


def test_models_that_do_not_share_have_devices_of_their_own():
    layouts = list(isolated_layouts(machine("h100"), 4))
    assert [x.split for x in layouts] == ["8 for both", "8 for both", "4:4"]
    servers = system_spec(machine("h100"), layouts[2]).servers
    assert [list(server.models) for server in servers] == [[0], [1], [2], [3]]
    assert len({e.processor for s in servers for e in (*s.prefill, *s.decode)}) == 8
    [alone] = isolated_layouts(machine("h100"), 8)
    [both] = {e.processor for e in system_spec(machine("h100"), alone).servers[3].decode}
    assert both == system_spec(machine("h100"), alone).servers[3].prefill[0].processor
    assert list(isolated_layouts(machine("h100", 4), 8)) == []


def test_uneven_hosting_counts_the_busiest():
    layout = Layout(True, "full", 4, 1, 1, 7, 1, hosted=1)
    assert layout.loaded_engines == 4
    assert replace(layout, hosted=2).loaded_engines == 6
    assert replace(layout, hosted=4).loaded_engines == 7


def plan(*flags: str) -> int:
    return main(["plan", *flags])


SMALL = [
    "--predict.machines=[{accelerator: h100, devices: 4}]",
    "--predict.models=[2]",
    "--predict.workload={pattern: react, models: 2, turns: 1, prompt: 512, generated: 4}",
    "--predict.concurrency=[1, 2]",
]


def test_predictions_are_written_and_labelled(tmp_path, capsys):
    document = tmp_path / "doc.md"
    document.write_text("before\n<!-- plan: begin -->\nstale figures\n<!-- plan: end -->\nafter\n")
    flags = [f"--json={tmp_path}/plan.json", f"--plots={tmp_path}", f"--markdown={document}"]
    assert plan(*SMALL, *flags) == 0
    result = json.loads((tmp_path / "plan.json").read_text())
    assert [case["modules"] for case in result["predictions"]] == ["full", "lora"]
    full = result["predictions"][0]
    assert [row["split"] for row in full["splits"]] == ["1:3", "2:2", "3:1"]
    assert [row["concurrency"] for row in full["curve"]] == [1, 2]
    assert full["limit"]["g_max"] > 1
    assert full["limit"]["gain"] == pytest.approx(
        max(r["generated_tokens_per_s"] for r in full["curve"])
        / max(r["generated_tokens_per_s"] for r in full["isolated_curve"])
    )
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale figures" not in text
    for section in text.split("#### ")[1:]:
        assert "Predicted, not measured" in section
    assert "4 x h100" in capsys.readouterr().out
    assert {file.name for file in tmp_path.glob("*.png")} == {"plan-splits.png", "plan-load.png"}


def test_bytes_that_the_compiler_counted(tmp_path):
    file = tmp_path / "compiled.json"
    compiled = {"accessed_bytes": 3e9, "least_bytes": 2e9}
    row = {"accelerator": "v6e:2x4", "model": "Llama-3.1-8B", "program": "decode step"}
    other = row | {"accelerator": "h100", "compiled": compiled | {"accessed_bytes": None}}
    file.write_text(json.dumps({"outcomes": [other, row | {"compiled": compiled}]}))
    machines = [MachineOptions("h100"), MachineOptions("v6e:2x4")]
    found = cases(
        PredictOptions(machines=machines, models=[4], modules=["full"], compiled=str(file))
    )
    assert [machine.efficiency.extra_bytes for machine, _, _ in found] == [1.0, 1.5]


def measured(folder: Path, sharing: str) -> Path:
    """A serving configuration, and beside it results of micro."""
    file = folder / f"{sharing}.yaml"
    names = ("planner", "coder")
    models = [{"name": name, "sharing": sharing} for name in names]
    file.write_text(yaml.safe_dump({"base": "none", "models": models, "max_model_len": 1024}))
    for i, result in enumerate(RESULTS):
        (folder / f"micro{i}.json").write_text(json.dumps(result))
    return file


def agents_result(folder: Path, throughput: float) -> Path:
    options = {
        "workload": {
            "pattern": "react",
            "models": 2,
            "turns": 1,
            "prompt": 101,
            "generated": 2,
            "observed": 0,
        },
        "shared": str(measured(folder, "shared")),
        "isolated": str(measured(folder, "isolated")),
        "server_args": [],
        "rate": 0.0,
        "sessions": 4,
        "warmup": 1,
    }
    run = {"models": 2, "concurrency": 1, "round": 0, "seed": 0, "sessions": 4}
    run |= {"session_s": {"p95": 1.0}}
    run |= {"ttft_s": {"p95": 1.0}, "call_s": {"p50": 1.0, "p95": 1.0}}
    runs = [
        run | {"target": "shared", "generated_tokens_per_s": throughput},
        run | {"target": "isolated", "generated_tokens_per_s": throughput / 2},
    ]
    file = folder / "agents.json"
    file.write_text(json.dumps({"options": options, "targets": [], "runs": runs}))
    return file


def test_predicted_against_measured(tmp_path, capsys):
    file = agents_result(tmp_path, 100.0)
    micro = f"--micro=[{tmp_path}/micro0.json,{tmp_path}/micro1.json]"
    code = plan(f"--validate={file}", micro, f"--json={tmp_path}/out.json", f"--plots={tmp_path}")
    assert code == 0
    result = json.loads((tmp_path / "out.json").read_text())
    shared, isolated = result["validation"]
    # Two calls of 100 and 2 tokens to cover: a chunk of 128 (10 ms + 50.5 us), and one of 32 (4.7
    # ms + 101.5 us, between a step and a chunk); then two tokens each of 3 ms and a us a position.
    step = 3e-3 + (7e-3 * 31 / 127)
    first = 10e-3 + 50.5e-6 + 6e-3 + 203e-6
    second = step + 101.5e-6 + 6e-3 + 207e-6
    expected = 4 / (first + second)
    assert shared["predicted"]["generated_tokens_per_s"] == pytest.approx(expected, rel=2e-3)
    error = shared["error"]["generated_tokens_per_s"]
    assert error == pytest.approx(expected / 100 - 1, rel=0.02)
    assert isolated["predicted"]["generated_tokens_per_s"] < expected
    [ratio] = result["validation_ratios"]
    assert ratio["measured"] == 2
    out = capsys.readouterr().out
    assert "Predicted against measured" in out
    assert (tmp_path / "plan-validate.png").stat().st_size > 0


def test_passes_of_a_server_tell_what_its_tokens_take_more(tmp_path, capsys):
    file = agents_result(tmp_path, 100.0)
    result = json.loads(file.read_text())
    # Four tokens, a session at a time: 3 ms, a us a position, and 1.5 ms that micro has not seen.
    decode = 4 * 3e-3 + (101 + 102 + 103 + 104) * 1e-6 + 4 * 1.5e-3
    passes = tmp_path / "passes.json"
    passes.write_text(json.dumps(result | {"limits": [{"models": 2, "decode_s": decode}]}))
    flags = [f"--validate={file}", f"--micro=[{tmp_path}/micro0.json,{tmp_path}/micro1.json]"]
    throughput = []
    for host in ("--host.token_seconds=0.0015", f"--host.passes=[{passes}]"):
        assert plan(*flags, host, f"--json={tmp_path}/out.json") == 0
        out = json.loads((tmp_path / "out.json").read_text())
        throughput.append(out["validation"][0]["predicted"]["generated_tokens_per_s"])
    assert throughput[1] == pytest.approx(throughput[0], rel=0.01)
    capsys.readouterr()
    passes.write_text(json.dumps(result | {"limits": []}))
    assert plan(*flags, f"--host.passes=[{passes}]") == 2
    assert "no result of `bench agents` with limits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--predict.model=GPT-5", "model: unknown 'GPT-5'"),
        ("--predict.machines=[{accelerator: v9}]", "machines: unknown 'v9'"),
        ("--predict.machines=[{accelerator: h100, devices: 1}]", "at least 2 devices"),
        ("--predict.models=[3]", "16 calls cannot be divided among 3"),
        ("--predict.concurrency=[]", "numbers from 1 up"),
        ("--predict.concurrency=[1000]", "batch_buckets"),
        ("--predict.efficiency.compute=1.5", "efficiency.compute: must be above 0 and at most 1"),
        ("--host.token_seconds=-1", "host: seconds must not be negative"),
        ("--validate=none.json", "validate: none.json cannot be read"),
        ("--predict.compiled=none.json", "compiled: none.json is no result"),
        ("--markdown=none.md", "no document none.md"),
    ],
)
def test_wrong_options_are_named(flag, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan(flag) == 2
    assert message in capsys.readouterr().err


def test_validation_needs_servers_and_costs(tmp_path, capsys):
    file = agents_result(tmp_path, 1.0)
    assert plan(f"--validate={file}") == 2
    assert "name result files of `bench micro" in capsys.readouterr().err
    result = json.loads(file.read_text())
    result["options"] |= {"shared": None, "isolated": None}
    file.write_text(json.dumps(result))
    assert plan(f"--validate={file}", f"--micro=[{tmp_path}/micro0.json]") == 2
    assert "no server that `bench agents` started" in capsys.readouterr().err


def test_kinds_of_modules_come_from_their_checkpoints(tmp_path):
    config = served.load_server(str(measured(tmp_path, "shared")), [])
    assert (served.is_lora(config), served.is_one_group(config)) == (False, True)
    lora, full = tmp_path / "lora", tmp_path / "full"
    for folder in (lora, full):
        folder.mkdir()
        about = {"certificate": {"kind": folder.name}}
        (folder / "pshare.json").write_text(json.dumps(about))
    entries = [replace(entry, checkpoint=str(lora)) for entry in config.models]
    own = [replace(entry, checkpoint=str(full)) for entry in config.models]
    assert served.is_lora(replace(config, models=entries))
    assert served.is_lora(replace(config, models=[entries[0], config.models[1]]))
    apart = replace(config, models=own)
    assert (served.is_lora(apart), served.is_one_group(apart)) == (False, False)
    missing = replace(config.models[0], checkpoint=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"there is no .*none/pshare\.json"):
        served.is_lora(replace(config, models=[missing]))
    with pytest.raises(ConfigError, match=r"all full, or none, .* not full, lora"):
        served.is_lora(replace(config, models=[entries[0], own[1]]))
    assert served.DEFAULT_POOL_SEQUENCES == DEFAULT_POOL_SEQUENCES


def test_the_documents_have_their_markers():
    text = (ROOT / "docs/benchmarks.md").read_text()
    for name in ("agents", "validation", "plan"):
        assert text.count(f"<!-- {name}: begin -->") == text.count(f"<!-- {name}: end -->") == 1
