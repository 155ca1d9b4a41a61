"""Runs: they learn, resume to the bit, refuse to mix, and leave a decode module."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from pshare_jax.config import ServeConfig
from pshare_jax.convert.orbax import open_weights, read_manifest
from pshare_jax.core.split_rule import LastTokens
from pshare_jax.engine.orchestrator import compute_dtype
from pshare_jax.errors import ConfigError, DataError, TrainingError
from pshare_jax.models.split import check_certificate
from pshare_jax.models.weights import lora_specs
from pshare_jax.train.config import LoraConfig
from pshare_jax.train.loop import StopRequestedError, train
from pshare_jax.train.optimizer import step_rates
from pshare_jax.train.report import Reporter
from pshare_jax.train.step import Computations
from tests.train.helpers import (
    MODEL,
    chats,
    losses,
    metrics,
    scalars,
    train_config,
    write_jsonl,
)

QUIET = Reporter(active=False)


def module_weights(folder) -> dict[str, np.ndarray]:
    return {name: t.read() for name, t in open_weights(folder / "decode_module").items()}


def assert_same_weights(a, b) -> None:
    first, second = module_weights(a), module_weights(b)
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.tobytes() == second[name].tobytes(), name


def assert_learned(folder) -> None:
    values = losses(folder)
    assert np.mean(values[-2:]) < 0.7 * values[0]


def test_a_run_learns_and_records_what_it_did(plain_run, data, held_out):
    folder, record = plain_run
    assert_learned(folder)
    assert record == json.loads((folder / "decode_module/training.json").read_text())
    assert record["steps"] == record["exported_step"] == 10
    assert record["train_loss"] == losses(folder)[-1]
    assert record["data"]["train_examples"] == 40
    assert record["data"]["eval_examples"] == 10
    assert len(record["data"]["train_sha256"]) == 64
    assert record["config"]["tail"] == 2
    lines = metrics(folder)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    evaluated = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(evaluated) == [3, 6, 9, 10]
    assert record["eval_loss"] == evaluated[10] < evaluated[3]
    for line in lines:
        if "loss" in line:
            assert line["tokens_per_second"] > 0
            assert line["utilisation"] > 0
            assert line["target_tokens"] > 0
    assert lines[0]["epoch"] == 0.2


def test_the_module_states_how_it_was_trained(plain_run, base):
    manifest = read_manifest(plain_run.folder / "decode_module")
    certificate = manifest.certificate
    assert certificate is not None
    assert (certificate.kind, certificate.tail) == ("full", LastTokens(2))
    assert certificate.cache_conditioned
    check_certificate(certificate, read_manifest(base).fingerprint, "shared")


@pytest.fixture
def config(base, data, held_out, tmp_path):
    """The configuration of `plain_run`, in another folder."""
    return train_config(
        base,
        data,
        tmp_path / "run",
        tail=2,
        data={"eval": [held_out]},
        optimizer={"epochs": 2},
        report={"eval_every": 3},
    )


@pytest.fixture
def rates(monkeypatch) -> list[float]:
    """The learning rate of each step that is computed."""
    taken = []
    compute = Computations.update

    def update(self, trainable, state, gradients, rate):
        taken.append(float(rate))
        return compute(self, trainable, state, gradients, rate)

    monkeypatch.setattr(Computations, "update", update)
    return taken


def test_a_stopped_run_goes_on_to_the_same_bits(config, plain_run, tmp_path, rates):
    folder = tmp_path / "run"
    for stop_after in (4, 3):
        asked = itertools.count(1)
        with pytest.raises(StopRequestedError):
            train(config, QUIET, lambda: next(asked) == stop_after)  # noqa: B023
    # What a killed process may have logged after its last checkpoint is logged again.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 99.0}\n{"step": 9, "lo')
    record = train(config, QUIET)
    assert record["train_loss"] == plain_run.record["train_loss"]
    assert record["eval_loss"] == plain_run.record["eval_loss"]
    assert losses(folder) == losses(plain_run.folder)
    assert rates == step_rates(config.optimizer, 10).tolist()
    assert_same_weights(folder, plain_run.folder)


def test_a_finished_run_is_left_alone(config, plain_run, tmp_path):
    again = dataclasses.replace(config, output=str(plain_run.folder))
    assert train(again, QUIET) == plain_run.record
    with pytest.raises(ConfigError, match="a run with tail = 2, not 3"):
        train(dataclasses.replace(again, tail=3), QUIET)
    other = write_jsonl(tmp_path / "other.jsonl", chats(40, seed=7))
    data = dataclasses.replace(again.data, train=[other])
    with pytest.raises(ConfigError, match=r"a run with data\.train_sha256 = "):
        train(dataclasses.replace(again, data=data), QUIET)


def test_what_a_run_tells_and_leaves_in_the_home_folder(
    config, plain_run, tmp_path, monkeypatch, capsys, rates
):
    monkeypatch.setenv("HOME", str(tmp_path))
    report = dataclasses.replace(config.report, peak_tflops=1e-6)
    train(dataclasses.replace(config, output="~/mine", report=report), Reporter())
    assert_same_weights(tmp_path / "mine", plain_run.folder)
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "checkpoints",
        "decode_module",
        "metrics.jsonl",
        "run.json",
    ]
    lines = capsys.readouterr().err.splitlines()
    last = next(line for line in lines if line.startswith("training 10/10 "))
    shown = re.fullmatch(
        r"training 10/10  loss (\S+)  (\S+) tokens/s  (\S+)% of peak  0:00:00 left", last
    )
    assert shown is not None, last
    steps = [line for line in metrics(tmp_path / "mine") if "loss" in line]
    assert rates == step_rates(config.optimizer, 10).tolist()
    assert rates == [line["learning_rate"] for line in steps]
    logged = steps[-1]
    loss, speed, utilisation = (float(text.replace(",", "")) for text in shown.groups())
    assert loss == pytest.approx(logged["loss"], abs=1e-4)
    assert speed == pytest.approx(logged["tokens_per_second"], abs=1)
    assert utilisation == pytest.approx(100 * logged["utilisation"], abs=1)
    assert any(re.fullmatch(r"step 10: eval loss \d\.\d{4}", line) for line in lines)
    assert any(line.startswith("without the kept KV it would take ") for line in lines)


def test_the_last_step_is_saved(plain_run):
    assert (plain_run.folder / "checkpoints/10").is_dir()


def test_a_stop_without_a_checkpoint_says_so(config, monkeypatch):
    usage = shutil.disk_usage(config.folder.parent)._replace(free=5000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(StopRequestedError, match="step 1; start again to go on after step 0"):
            train(config, QUIET, lambda: True)
    with pytest.raises(StopRequestedError, match=r"step 1; start again to go on$"):
        train(config, QUIET, lambda: True)


@pytest.fixture(scope="module")
def stopped(base, data, held_out, tmp_path_factory) -> Path:
    """The folder of a run that was stopped after its first step; no test changes it."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    epochs = {"epochs": 2}
    config = train_config(base, data, folder, tail=2, data={"eval": [held_out]}, optimizer=epochs)
    with pytest.raises(StopRequestedError):
        train(config, QUIET, lambda: True)
    return folder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tail": 3}, "a run with tail = 2, not 3"),
        ({"optimizer": {"epochs": 1}}, "a run with optimizer.epochs = 2, not 1"),
        ({"other_data": True}, "a run with data.train_sha256 = "),
    ],
)
def test_a_folder_holds_one_run(stopped, base, data, held_out, tmp_path, overrides, message):
    if overrides.pop("other_data", False):
        data = write_jsonl(tmp_path / "other.jsonl", chats(40, seed=7))
    common = {"tail": 2, "data": {"eval": [held_out]}, "optimizer": {"epochs": 2}}
    changed = train_config(base, data, stopped, **{**common, **overrides})
    with pytest.raises(ConfigError, match=message):
        train(changed, QUIET)


def test_accumulation_gives_the_steps_of_whole_batches(base, data, plain_run, tmp_path):
    folder = tmp_path / "run"
    config = train_config(
        base, data, folder, tail=2, optimizer={"epochs": 2, "micro_batch_size": 4}
    )
    train(config, QUIET)
    np.testing.assert_allclose(losses(folder), losses(plain_run.folder), rtol=1e-4)


def test_bfloat16_keeps_float32_masters(base, data, held_out, plain_run, tmp_path):
    folder = tmp_path / "run"
    config = train_config(
        base,
        data,
        folder,
        tail=2,
        dtype="bfloat16",
        remat=True,
        data={"eval": [held_out]},
        optimizer={"epochs": 2, "clip_norm": 1e6},
    )
    train(config, QUIET)
    assert_learned(folder)
    np.testing.assert_allclose(losses(folder), losses(plain_run.folder), rtol=0.1)
    weight = module_weights(folder)["layers.0.mlp.up.kernel"]
    assert weight.dtype == np.float32
    # A step is smaller than bfloat16 could hold beside the weight.
    assert np.mean(weight.view(np.uint32) & 0xFFFF != 0) > 0.9


def test_bfloat16_multiplied_in_cpp(base, data, tmp_path):
    """The losses of XLA, and the same bits after a stop."""
    folders = {name: tmp_path / name for name in ("xla", "cpu_ffi", "stopped")}
    configs = {
        name: train_config(
            base,
            data,
            folder,
            dtype="bfloat16",
            kernel_backend="xla" if name == "xla" else "cpu_ffi",
        )
        for name, folder in folders.items()
    }
    train(configs["xla"], QUIET)
    record = train(configs["cpu_ffi"], QUIET)
    np.testing.assert_allclose(losses(folders["cpu_ffi"]), losses(folders["xla"]), rtol=5e-3)
    asked = itertools.count(1)
    with pytest.raises(StopRequestedError):
        train(configs["stopped"], QUIET, lambda: next(asked) == 2)
    assert train(configs["stopped"], QUIET)["train_loss"] == record["train_loss"]
    assert losses(folders["stopped"]) == losses(folders["cpu_ffi"])
    assert_same_weights(folders["stopped"], folders["cpu_ffi"])


@pytest.mark.parametrize(("backend", "dtype"), [("auto", "bfloat16"), ("xla", "float32")])
def test_the_dtype_is_the_servers_unless_given(base, data, tmp_path, backend, dtype):
    steps = {"max_steps": 1}
    config = train_config(
        base, data, tmp_path / "run", dtype="auto", kernel_backend=backend, optimizer=steps
    )
    train(config, QUIET)
    served = ServeConfig(str(base), kernel_backend=backend)
    known = json.loads((tmp_path / "run/run.json").read_text())["config"]["dtype"]
    assert known == dtype == compute_dtype(served).name


def test_a_backend_that_cannot_be(base, data, tmp_path):
    config = train_config(base, data, tmp_path / "run", dtype="float32", kernel_backend="cpu_ffi")
    with pytest.raises(ConfigError, match="kernel_backend: cpu_ffi multiplies bfloat16"):
        train(config, QUIET)


def test_lora_trains_factors_only(base, data, held_out, tmp_path):
    folder = tmp_path / "run"
    config = train_config(
        base,
        data,
        folder,
        lora=LoraConfig(rank=2, alpha=8.0, targets=["q", "v", "up"]),
        data={"eval": [held_out]},
        optimizer={"epochs": 3, "learning_rate": 0.05},
        report={"tensorboard": True},
    )
    train(config, QUIET)
    assert_learned(folder)
    certificate = read_manifest(folder / "decode_module").certificate
    assert certificate is not None
    assert (certificate.lora_rank, certificate.lora_alpha) == (2, 8.0)
    assert certificate.cache_conditioned
    weights = module_weights(folder)
    assert weights.keys() == lora_specs(MODEL, 2, ("q", "v", "up")).keys()
    assert all(np.abs(weight).max() > 0 for weight in weights.values())
    events = scalars(folder / "tensorboard")
    assert [step for step, _ in events["loss"]] == list(range(1, 16))
    assert [value for _, value in events["loss"]] == pytest.approx(losses(folder))
    assert [step for step, _ in events["eval_loss"]] == [15]


def test_the_best_weights_are_exported_on_demand(base, data, held_out, tmp_path):
    folder = tmp_path / "run"
    config = train_config(
        base,
        data,
        folder,
        tail=2,
        data={"eval": [held_out]},
        optimizer={"learning_rate": 0.3, "schedule": "constant", "max_steps": 4},
        report={"eval_every": 1},
        checkpoint={"export": "best", "keep": 1},
    )
    record = train(config, QUIET)
    evaluated = {line["step"]: line["eval_loss"] for line in metrics(folder) if "eval_loss" in line}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert best < 4, "the rate is meant to be too high"
    assert record["exported_step"] == best
    assert record["eval_loss"] == evaluated[best]


def test_a_loss_that_is_not_finite_ends_the_run(base, data, held_out, tmp_path):
    config = train_config(
        base,
        data,
        tmp_path / "run",
        tail=2,
        data={"eval": [held_out]},
        optimizer={"learning_rate": 1e30},
    )
    with pytest.raises(TrainingError, match=r"the loss of step \d is nan; lower"):
        train(config, QUIET)


def test_bad_lines_are_counted_in_the_record(base, data, tmp_path):
    path = tmp_path / "data.jsonl"
    first, rest = Path(data).read_text().split("\n", 1)
    path.write_text(f"{first}\nnonsense\n{rest}")
    config = train_config(base, str(path), tmp_path / "run", optimizer={"max_steps": 1})
    with pytest.raises(DataError, match=r"data.jsonl:2: not valid JSON"):
        train(config, QUIET)
    skipping = dataclasses.replace(
        config, data=dataclasses.replace(config.data, on_bad_line="skip")
    )
    record = train(skipping, QUIET)
    assert record["data"]["train_examples"] == 40
    assert record["data"]["train_bad_lines"] == 1
