"""Teachers and starts of every kind: whole models, LoRA modules, PEFT's folders."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pshare_jax.convert.conversions import export
from pshare_jax.convert.manifest import read_manifest
from pshare_jax.convert.orbax import load_weights
from pshare_jax.core.split_rule import LastTokens
from pshare_jax.errors import CertificateError, ConfigError, PshareError
from pshare_jax.models.lora import LoraModule, merge
from pshare_jax.models.split import check_certificate
from pshare_jax.train.config import DistillConfig, LoraConfig
from pshare_jax.train.fine_tune import FineTune
from pshare_jax.train.loop import StopRequestedError, train
from pshare_jax.train.report import Reporter
from tests.train.helpers import losses, metrics, train_config

QUIET = Reporter(active=False)
LORA = LoraConfig(rank=2, alpha=8.0, targets=["q", "v", "up"])


@pytest.fixture(scope="module")
def lora_run(base, data, tmp_path_factory):
    """An ordinary LoRA fine-tune: KV of its own."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    config = train_config(
        base, data, folder, mode="full", lora=LORA, optimizer={"learning_rate": 0.05, "epochs": 2}
    )
    train(config, QUIET)
    return folder


@pytest.fixture(scope="module")
def peft(base, lora_run, tmp_path_factory):
    """The same as PEFT would have saved it."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    export(lora_run / "decode_module", folder, base=base)
    assert (folder / "adapter_config.json").is_file()
    return folder


def merged(base, lora_run) -> dict[str, np.ndarray]:
    weights = load_weights(lora_run / "decode_module", dtype=jnp.float32)
    module = LoraModule(weights, LORA.alpha, LORA.rank, tuple(LORA.targets))
    return merge(load_weights(base, dtype=jnp.float32), module)


def assert_distils(base, data, held_out, folder, teacher, *, share, rate, **more) -> None:
    """The loss of the rows held out ends below `share` of what it is after one step, at a learning
    rate of `rate`, and the module may read the base's KV."""
    config = train_config(
        base,
        data,
        folder,
        mode="distill",
        distill=DistillConfig(teacher=str(teacher)),
        data={"eval": [held_out]},
        optimizer={"epochs": 3, "learning_rate": rate},
        report={"eval_every": 1},
        **more,
    )
    with pytest.raises(StopRequestedError):
        train(config, QUIET, lambda: True)
    first = metrics(folder)[-1]["eval_loss"]
    seldom = dataclasses.replace(config.report, eval_every=0)
    record = train(dataclasses.replace(config, report=seldom), QUIET)
    assert record["eval_loss"] < share * first
    certificate = read_manifest(folder / "decode_module").certificate
    assert certificate is not None
    assert certificate.cache_conditioned


def test_ordinary_fine_tuning_may_not_share(ordinary_run, base):
    curve = losses(ordinary_run)
    assert np.mean(curve[-2:]) < 0.7 * curve[0]
    certificate = read_manifest(ordinary_run / "decode_module").certificate
    assert certificate is not None
    assert certificate.tail == LastTokens(1)
    fingerprint = read_manifest(base).fingerprint
    check_certificate(certificate, fingerprint, "isolated")
    with pytest.raises(CertificateError, match="sharing: isolated"):
        check_certificate(certificate, fingerprint, "shared")


def test_distilling_moves_a_fine_tune_onto_the_shared_kv(
    ordinary_run, base, data, held_out, tmp_path
):
    # The teacher as it would come from elsewhere: a Hugging Face folder.
    export(ordinary_run / "decode_module", tmp_path / "teacher", base=base)
    teacher = tmp_path / "teacher"
    assert_distils(base, data, held_out, tmp_path / "run", teacher, share=0.6, rate=3e-3)


def test_a_teacher_must_be_a_fine_tune_of_the_base(base, data, plain_run, tmp_path):
    def distill_from(teacher):
        config = train_config(
            base,
            data,
            tmp_path / "run",
            mode="distill",
            distill=DistillConfig(teacher=str(teacher)),
        )
        train(config, QUIET)

    with pytest.raises(ConfigError, match="no decode module"):
        distill_from(base)


def test_ordinary_lora_fine_tuning_may_not_share(base, lora_run):
    curve = losses(lora_run)
    assert curve[-1] < 0.85 * curve[0]
    certificate = read_manifest(lora_run / "decode_module").certificate
    assert certificate is not None
    assert (certificate.kind, certificate.lora_rank, certificate.lora_alpha) == ("lora", 2, 8.0)
    assert not certificate.cache_conditioned


@pytest.mark.parametrize("kind", ["module", "peft"])
def test_a_lora_is_the_base_with_its_update(base, lora_run, peft, kind):
    path = str(peft if kind == "peft" else lora_run / "decode_module")
    found = FineTune(path, read_manifest(base), "distill.teacher")
    found.check_teaches()
    weights = found.load(_mesh(), np.float32)
    expected = merged(base, lora_run)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        np.testing.assert_allclose(weight, expected[name], atol=1e-6, rtol=1e-6)


def _mesh():
    from pshare_jax.train.config import MeshConfig
    from pshare_jax.train.distributed import make_mesh

    return make_mesh(MeshConfig())


def test_distilling_from_pefts_folder(base, data, held_out, peft, tmp_path):
    assert_distils(base, data, held_out, tmp_path / "run", peft, share=0.3, rate=0.05, lora=LORA)


def test_a_student_of_all_weights_starts_as_its_lora_teacher(base, data, peft, tmp_path):
    """With nothing read from the base's KV, student and teacher are one."""
    config = train_config(
        base,
        data,
        tmp_path / "run",
        mode="distill",
        tail=128,
        distill=DistillConfig(teacher=str(peft)),
        optimizer={"max_steps": 1},
    )
    train(config, QUIET)
    assert losses(tmp_path / "run")[0] == pytest.approx(0, abs=1e-5)


def test_a_module_of_the_shared_cache_is_no_teacher(base, data, plain_run, tmp_path):
    teacher = str(plain_run.folder / "decode_module")
    config = train_config(
        base, data, tmp_path / "run", mode="distill", distill=DistillConfig(teacher=teacher)
    )
    with pytest.raises(ConfigError, match=r"distill.teacher: .*trained on the base's KV.*init"):
        train(config, QUIET)


def test_an_activated_lora_is_no_teacher(base, data, peft, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(peft, teacher)
    options = json.loads((teacher / "adapter_config.json").read_text())
    options["alora_invocation_tokens"] = [5, 6]
    (teacher / "adapter_config.json").write_text(json.dumps(options))
    distill = DistillConfig(teacher=str(teacher))
    config = train_config(base, data, tmp_path / "run", mode="distill", distill=distill)
    with pytest.raises(PshareError, match=r"alora_invocation_tokens|trained on the base's KV"):
        train(config, QUIET)


def test_a_teacher_replaced_under_the_same_path_is_noticed(base, data, peft, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(peft, teacher)
    distill = DistillConfig(teacher=str(teacher))
    first = train_config(base, data, tmp_path / "run", mode="distill", lora=LORA, distill=distill)
    train(first, QUIET)
    # It has been moved: still the same teacher.
    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)
    again = train_config(
        base, data, tmp_path / "run", mode="distill", lora=LORA, distill=DistillConfig(str(moved))
    )
    train(again, QUIET)
    tensors = load_file(teacher / "adapter_model.safetensors")
    changed = {name: tensor * 2 for name, tensor in tensors.items()}
    save_file(changed, teacher / "adapter_model.safetensors")
    for folder in ("run", "unfinished"):
        if folder == "unfinished":
            (tmp_path / "unfinished").mkdir()
            shutil.copy(tmp_path / "run/run.json", tmp_path / "unfinished/run.json")
        config = train_config(
            base, data, tmp_path / folder, mode="distill", lora=LORA, distill=distill
        )
        with pytest.raises(ConfigError, match="another teacher: its content differs"):
            train(config, QUIET)
    # A finished run does not need it any more.
    shutil.rmtree(teacher)
    record = train(first, QUIET)
    assert record["sources"].keys() == {"teacher"}


def test_weights_start_from_a_module(base, data, plain_run, lora_run, tmp_path):
    """The first loss is the one that the module has come to."""
    config = train_config(
        base,
        data,
        tmp_path / "full",
        tail=2,
        init=str(plain_run.folder / "decode_module"),
        optimizer={"max_steps": 1, "learning_rate": 1e-6},
    )
    record = train(config, QUIET)
    assert losses(tmp_path / "full")[0] < 0.7 * losses(plain_run.folder)[0]
    assert record["sources"].keys() == {"init"}
    start = load_weights(plain_run.folder / "decode_module", dtype=jnp.float32)
    end = load_weights(tmp_path / "full" / "decode_module", dtype=jnp.float32)
    for name, weight in start.items():
        np.testing.assert_allclose(end[name], weight, atol=1e-4)
    lora = train_config(
        base,
        data,
        tmp_path / "lora",
        lora=LORA,
        init=str(lora_run / "decode_module"),
        optimizer={"max_steps": 1, "learning_rate": 1e-6},
    )
    train(lora, QUIET)
    ours = load_weights(tmp_path / "lora" / "decode_module", dtype=jnp.float32)
    for name, weight in load_weights(lora_run / "decode_module", dtype=jnp.float32).items():
        np.testing.assert_allclose(ours[name], weight, atol=1e-4)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraConfig(rank=4, alpha=8.0, targets=["q", "v", "up"]), r"has lora.rank 2, not 4"),
        (LoraConfig(rank=2, alpha=9.0, targets=["q", "v", "up"]), r"has lora.alpha 8.0, not 9.0"),
        (LoraConfig(rank=2, alpha=8.0, targets=["q", "v"]), r"has lora.targets .*'up'.*, not"),
    ],
    ids=["rank", "alpha", "targets"],
)
def test_a_start_of_another_shape_is_refused(base, data, lora_run, tmp_path, lora, message):
    start = str(lora_run / "decode_module")
    config = train_config(base, data, tmp_path / "run", lora=lora, init=start)
    with pytest.raises(ConfigError, match=rf"^init: .*{message}"):
        train(config, QUIET)


def test_a_start_of_all_weights_is_no_lora(base, data, plain_run, tmp_path):
    start = str(plain_run.folder / "decode_module")
    config = train_config(base, data, tmp_path / "run", lora=LORA, init=start)
    with pytest.raises(ConfigError, match=r"has all weights, but lora.rank is 2"):
        train(config, QUIET)


def test_run_json_names_what_decided_the_weights(lora_run):
    assert json.loads((lora_run / "run.json").read_text())["sources"] == {}
