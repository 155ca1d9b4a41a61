"""Decode modules: copies, full fine-tunes and LoRA, in and out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pshare_jax.convert import names, peft
from pshare_jax.convert.conversions import export, import_model, make_decoder
from pshare_jax.convert.orbax import load_weights, read_manifest, write_decode, write_prefill
from pshare_jax.core.split_rule import Invocation, LastTokens
from pshare_jax.errors import CertificateError, CheckpointError
from pshare_jax.models.weights import LORA_TARGETS, lora_specs
from tests.convert.helpers import (
    TOKENIZER_FILES,
    model_config,
    random_tensors,
    random_weights,
    same_bits,
    write_hf_folder,
)

CONFIG = model_config()
PREFIX = "base_model.model."
OPTIONS = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "some/base",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "down_proj"],
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "init_lora_weights": True,
    "inference_mode": True,
    "megatron_core": "megatron.core",
}


@pytest.fixture(scope="module")
def hf_base(tmp_path_factory):
    return write_hf_folder(tmp_path_factory.mktemp("hf") / "base", CONFIG, random_weights(CONFIG))


@pytest.fixture(scope="module")
def base(hf_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    import_model(hf_base, folder)
    return folder


def write_peft(folder: Path, factors, **options) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**OPTIONS, **options}))
    tensors = {
        PREFIX + names.native_to_hf(name, CONFIG): np.ascontiguousarray(
            names.to_hf(name, value, CONFIG)
        )
        for name, value in factors.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def factors_for(*targets: str, rank: int = 4, dtype: str = "float32"):
    return random_tensors(lora_specs(CONFIG, rank, targets), dtype=dtype)


def check_refused(make, dest: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        make(dest)
    for word in words:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not dest.exists()


# Full decode modules


def test_by_default_a_decoder_is_a_copy_of_the_base(base, tmp_path):
    make_decoder(base, tmp_path / "m")
    manifest = read_manifest(tmp_path / "m")
    assert manifest.certificate is not None
    assert manifest.certificate.kind == "full"
    assert manifest.certificate.cache_conditioned
    assert manifest.certificate.tail == LastTokens(1)
    assert manifest.certificate.prefill_fingerprint == read_manifest(base).fingerprint
    mine, its = load_weights(tmp_path / "m"), load_weights(base)
    assert all(same_bits(mine[name], value) for name, value in its.items())


@pytest.mark.parametrize("asserted", [False, True])
def test_a_fine_tune_is_cache_conditioned_only_when_asserted(base, tmp_path, asserted):
    weights = random_weights(CONFIG, seed=1)
    folder = write_hf_folder(tmp_path / "hf", CONFIG, weights, max_position_embeddings=99)
    (folder / "tokenizer.json").unlink()
    make_decoder(base, tmp_path / "m", fine_tune=folder, tail=4, cache_conditioned=asserted)
    manifest = read_manifest(tmp_path / "m")
    assert manifest.certificate is not None
    assert manifest.certificate.cache_conditioned is asserted
    assert manifest.certificate.tail == LastTokens(4)
    assert manifest.certificate.weights_fingerprint != manifest.certificate.prefill_fingerprint
    loaded = load_weights(tmp_path / "m")
    assert all(same_bits(loaded[name], value) for name, value in weights.items())


def test_a_fine_tune_gets_the_dtype_of_its_base(base, hf_base, tmp_path):
    import_model(hf_base, tmp_path / "base16", dtype="bfloat16")
    assert make_decoder(tmp_path / "base16", tmp_path / "a", fine_tune=hf_base).dtype == "bfloat16"
    assert make_decoder(base, tmp_path / "b", fine_tune=hf_base).dtype == "float32"


@pytest.mark.parametrize(
    ("field", "value"), [("rope_theta", 5000.0), ("intermediate_size", 32), ("num_layers", 1)]
)
def test_another_architecture_is_no_fine_tune(base, tmp_path, field, value):
    other = model_config(**{field: value})
    folder = write_hf_folder(tmp_path / "hf", other, random_weights(other))
    check_refused(
        lambda dest: make_decoder(base, dest, fine_tune=folder), tmp_path / "m", field, str(value)
    )


def test_tail_zero_is_refused(base, tmp_path):
    check_refused(lambda dest: make_decoder(base, dest, tail=0), tmp_path / "m", "tail is 0")


def test_a_full_module_is_exported_with_its_base_tokenizer(base, hf_base, tmp_path):
    weights = random_weights(CONFIG, seed=1)
    folder = write_hf_folder(tmp_path / "hf", CONFIG, weights, note="mine")
    make_decoder(base, tmp_path / "m", fine_tune=folder)
    export(tmp_path / "m", tmp_path / "with", base=base)
    export(tmp_path / "m", tmp_path / "without")
    original = load_file(folder / "model.safetensors")
    for dest in ("with", "without"):
        back = load_file(tmp_path / dest / "model.safetensors")
        assert all(same_bits(back[name], value) for name, value in original.items())
        about = json.loads((tmp_path / dest / "config.json").read_text())
        assert about == json.loads((folder / "config.json").read_text())
    name = "tokenizer.json"
    assert (tmp_path / "with" / name).read_bytes() == (hf_base / name).read_bytes()
    assert not (tmp_path / "without" / name).exists()


def test_export_beside_another_base_is_refused(base, tmp_path):
    other = write_hf_folder(tmp_path / "hf", CONFIG, random_weights(CONFIG, seed=5))
    import_model(other, tmp_path / "other")
    make_decoder(base, tmp_path / "m")
    with pytest.raises(CertificateError, match="is not the base"):
        export(tmp_path / "m", tmp_path / "out", base=tmp_path / "other")
    assert not (tmp_path / "out").exists()


# LoRA


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", [("q", "v"), ("down",), LORA_TARGETS])
def test_lora_is_exported_as_it_was_imported(base, tmp_path, targets, dtype):
    factors = factors_for(*targets, dtype=dtype)
    folder = write_peft(
        tmp_path / "peft", factors, target_modules=[f"{target}_proj" for target in targets]
    )
    manifest = make_decoder(base, tmp_path / "m", lora=folder, tail=2)
    certificate = manifest.certificate
    assert certificate is not None
    assert (certificate.kind, certificate.tail) == ("lora", LastTokens(2))
    assert not certificate.cache_conditioned
    assert (certificate.lora_rank, certificate.lora_alpha) == (4, 8.0)
    assert certificate.lora_targets == targets
    assert manifest.dtype == dtype
    loaded = load_weights(tmp_path / "m")
    assert set(loaded) == set(factors)
    assert all(same_bits(loaded[name], value) for name, value in factors.items())

    export(tmp_path / "m", tmp_path / "out", base=base)
    original = load_file(folder / "adapter_model.safetensors")
    back = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(back) == set(original)
    assert all(same_bits(back[name], value) for name, value in original.items())
    about = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    kept = ("peft_type", "task_type", "r", "lora_alpha", "bias")
    assert {key: about[key] for key in kept} == {key: OPTIONS[key] for key in kept}
    assert about["target_modules"] == [f"{target}_proj" for target in targets]
    assert about["base_model_name_or_path"] == str(base)
    again = make_decoder(base, tmp_path / "again", lora=tmp_path / "out", tail=2)
    assert again.certificate == certificate


def test_an_exported_module_says_what_it_was(base, tmp_path):
    folder = write_peft(tmp_path / "peft", factors_for("q"))
    made = make_decoder(base, tmp_path / "m", lora=folder, tail=3, cache_conditioned=True)
    export(tmp_path / "m", tmp_path / "out", dtype="bfloat16")
    again = make_decoder(base, tmp_path / "again", lora=tmp_path / "out")
    assert made.certificate is not None
    assert again.certificate is not None
    for field in ("prefill_fingerprint", "tail", "cache_conditioned", "lora_alpha"):
        assert getattr(again.certificate, field) == getattr(made.certificate, field)
    assert again.dtype == "bfloat16"
    rounded = load_weights(tmp_path / "again")
    for name, value in load_weights(tmp_path / "m").items():
        assert same_bits(rounded[name], value.astype("bfloat16"))
    # A tail that is asked for goes before what the folder says.
    other = make_decoder(base, tmp_path / "tail", lora=tmp_path / "out", tail=1)
    assert other.certificate is not None
    assert other.certificate.tail == LastTokens(1)


def test_an_exported_module_stays_with_its_base(base, tmp_path):
    folder = write_peft(tmp_path / "peft", factors_for("q"))
    make_decoder(base, tmp_path / "m", lora=folder, tail=1, cache_conditioned=True)
    export(tmp_path / "m", tmp_path / "out")
    hf = write_hf_folder(tmp_path / "hf", CONFIG, random_weights(CONFIG, seed=5))
    import_model(hf, tmp_path / "other")
    with pytest.raises(CertificateError, match="made for the base"):
        make_decoder(tmp_path / "other", tmp_path / "again", lora=tmp_path / "out")
    (tmp_path / "out/pshare_certificate.json").write_text('{"tail": "two"}')
    with pytest.raises(CertificateError, match=r"pshare_certificate\.json: cannot be read"):
        make_decoder(base, tmp_path / "again", lora=tmp_path / "out")
    assert not (tmp_path / "again").exists()


def test_rank_stabilised_lora_is_a_larger_alpha(base, tmp_path):
    folder = write_peft(tmp_path / "peft", factors_for("q"), use_rslora=True)
    certificate = make_decoder(base, tmp_path / "m", lora=folder).certificate
    assert certificate is not None
    assert certificate.lora_alpha == pytest.approx(8 * math.sqrt(4))
    assert certificate.lora_alpha / 4 == pytest.approx(8 / math.sqrt(4))


@pytest.mark.parametrize(
    "option",
    [
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"(.*)*x": 8}},
        {"rank_pattern": {"a*b*c*d*e*": 8}},
        {"alpha_pattern": {"q_proj": "8"}},
        {"alpha_pattern": {"(q_proj": 8}},
        {"alpha_pattern": 8},
        {"bias": "some"},
        {"fan_in_fan_out": True},
        {"layers_to_transform": ["0"]},
        {"layer_replication": [[0, 2]]},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"peft_type": "IA3"},
        {"alora_invocation_tokens": []},
        {"alora_invocation_tokens": [-1]},
        {"trainable_token_indices": [1]},
        {"an_option_of_tomorrow": 3},
        {"r": 0},
        {"r": "4"},
        {"lora_alpha": None},
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_unsupported_option_is_named(base, tmp_path, option):
    folder = write_peft(tmp_path / "peft", factors_for("q", "down"), **option)
    name, value = next(iter(option.items()))
    check_refused(
        lambda dest: make_decoder(base, dest, lora=folder),
        tmp_path / "m",
        f"adapter_config.json: {name}={value!r}",
    )


def damaged(base, tmp_path, change, *words: str) -> None:
    folder = write_peft(tmp_path / "peft", factors_for("q", "down"))
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    check_refused(lambda dest: make_decoder(base, dest, lora=folder), tmp_path / "m", *words)


Q_A = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_A.weight"


def test_a_missing_factor_is_named(base, tmp_path):
    damaged(base, tmp_path, lambda t: t.pop(Q_A), f"tensor {Q_A} is missing")


def test_a_misshapen_factor_is_named(base, tmp_path):
    wrong = np.zeros((8, 48), np.float32)
    damaged(base, tmp_path, lambda t: t.update({Q_A: wrong}), Q_A, "[8, 48]", "r=4", "[4, 48]")


@pytest.mark.parametrize(
    "name",
    [
        f"{PREFIX}model.layers.2.self_attn.q_proj.lora_A.weight",
        f"{PREFIX}model.layers.0.self_attn.q_proj.lora_C.weight",
        f"{PREFIX}model.embed_tokens.lora_embedding_A",
        Q_A.removeprefix(PREFIX),
        f"{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector",
    ],
)
def test_an_unexpected_tensor_is_named(base, tmp_path, name):
    value = np.zeros((4, 48), np.float32)
    damaged(base, tmp_path, lambda t: t.update({name: value}), f"tensor {name} is unexpected")


def test_an_adapter_on_a_layer_that_the_options_leave_out_is_named(base, tmp_path):
    folder = write_peft(tmp_path / "peft", factors_for("q"), layers_to_transform=[0])
    check_refused(lambda dest: make_decoder(base, dest, lora=folder), tmp_path / "m", Q_A)


def test_a_rank_that_its_pattern_denies_is_named(base, tmp_path):
    folder = write_peft(tmp_path / "peft", factors_for("q"), rank_pattern={"q_proj": 8})
    check_refused(
        lambda dest: make_decoder(base, dest, lora=folder), tmp_path / "m", "but r=8 on this base"
    )


def test_dora_without_magnitudes_is_named(base, tmp_path):
    folder = write_peft(tmp_path / "peft", factors_for("q"), use_dora=True)
    check_refused(
        lambda dest: make_decoder(base, dest, lora=folder),
        tmp_path / "m",
        "q_proj.lora_magnitude_vector is missing",
    )


def test_an_activated_lora_shares_without_being_told_to(base, tmp_path):
    folder = write_peft(tmp_path / "peft", factors_for("q", "v"), alora_invocation_tokens=[7, 9])
    certificate = make_decoder(base, tmp_path / "m", lora=folder).certificate
    assert (certificate.tail, certificate.cache_conditioned) == (Invocation((7, 9)), True)
    export(tmp_path / "m", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert about["alora_invocation_tokens"] == [7, 9]
    again = make_decoder(base, tmp_path / "again", lora=tmp_path / "out").certificate
    assert again == certificate
    with pytest.raises(CertificateError, match="is an activated LoRA: its tail is"):
        make_decoder(base, tmp_path / "other", lora=folder, tail=3)
    assert not (tmp_path / "other").exists()


def test_an_activated_lora_that_is_more_is_refused(base, tmp_path):
    folder = write_peft(tmp_path / "peft", factors_for("q"), alora_invocation_tokens=[7])
    path = folder / "adapter_model.safetensors"
    norm = f"{PREFIX}model.norm.weight"
    save_file({**load_file(path), norm: np.ones(48, np.float32)}, path)
    check_refused(
        lambda dest: make_decoder(base, dest, lora=folder),
        tmp_path / "m",
        "alora_invocation_tokens together with",
    )


def test_an_adapter_with_weights_of_its_own_is_a_full_module(base, tmp_path):
    factors = factors_for("q")
    folder = write_peft(tmp_path / "peft", factors, modules_to_save=["norm"])
    path = folder / "adapter_model.safetensors"
    norm = np.full(48, 3.0, np.float32)
    save_file({**load_file(path), f"{PREFIX}model.norm.weight": norm}, path)
    manifest = make_decoder(base, tmp_path / "m", lora=folder)
    assert manifest.certificate.kind == "full"
    assert not manifest.certificate.cache_conditioned
    weights, before = load_weights(tmp_path / "m"), load_weights(base)
    np.testing.assert_array_equal(weights["final_norm.scale"], norm)
    a, b = (factors[f"layers.1.attn.q.lora_{x}"] for x in "ab")
    update = weights["layers.1.attn.q.kernel"] - before["layers.1.attn.q.kernel"]
    np.testing.assert_allclose(update, 2 * np.tensordot(a, b, 1), atol=1e-6)
    assert same_bits(weights["layers.1.attn.k.kernel"], before["layers.1.attn.k.kernel"])


def test_lora_on_projections_that_are_one_in_transformers_comes_back(tmp_path):
    """PEFT adapts Phi-3's fused projections: ranks one after another, blocks of B."""
    phi3 = model_config(architecture="phi3")
    prefill = write_prefill(tmp_path / "base", phi3, random_weights(phi3), TOKENIZER_FILES)
    targets = ("q", "v", "o", "gate", "up")
    factors = random_tensors(lora_specs(phi3, 3, targets))
    lora = {"lora_rank": 3, "lora_alpha": 6.0, "lora_targets": targets}
    write_decode(tmp_path / "m", prefill, factors, cache_conditioned=True, **lora)
    export(tmp_path / "m", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert about["target_modules"] == ["qkv_proj", "o_proj", "gate_up_proj"]
    assert about["rank_pattern"] == {"qkv_proj": 6, "gate_up_proj": 6}
    assert about["alpha_pattern"] == {"qkv_proj": 12, "gate_up_proj": 12}
    found = peft.read_lora(tmp_path / "out", phi3)
    assert (found.rank, found.alpha / found.rank) == (6, 2.0)
    assert found.targets == ("q", "k", "v", "o", "gate", "up")
    for path in ("layers.0.attn.q", "layers.1.attn.v", "layers.0.attn.o", "layers.1.mlp.up"):
        ours = np.tensordot(factors[f"{path}.lora_a"], factors[f"{path}.lora_b"], 1)
        a, b = (found.tensors[f"{path}.lora_{x}"].read() for x in "ab")
        np.testing.assert_allclose(np.tensordot(a, b, 1), ours, atol=1e-6, err_msg=path)
    assert not found.tensors["layers.0.attn.k.lora_b"].read().any()


def test_truncated_adapter_weights_are_named(base, tmp_path):
    folder = write_peft(tmp_path / "peft", factors_for("q"))
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    check_refused(
        lambda dest: make_decoder(base, dest, lora=folder), tmp_path / "m", str(path), "truncated"
    )


def test_a_folder_without_an_adapter(base, tmp_path):
    check_refused(
        lambda dest: make_decoder(base, dest, lora=tmp_path), tmp_path / "m", "adapter_config.json"
    )


def test_what_shares_needs_the_tail_that_it_was_trained_with(base, tmp_path):
    """One that was trained with 32 would answer wrongly with 1, and say nothing."""
    folder = write_peft(tmp_path / "peft", factors_for("q"))
    with pytest.raises(CertificateError, match=r"peft: .* name it: --tail 32"):
        make_decoder(base, tmp_path / "m", lora=folder, cache_conditioned=True)
    assert not (tmp_path / "m").exists()
    with pytest.raises(CertificateError, match="name it: --tail 32"):
        make_decoder(base, tmp_path / "m", fine_tune=base, cache_conditioned=True)
    made = make_decoder(base, tmp_path / "m", lora=folder)
    assert made.certificate is not None
    assert made.certificate.tail == LastTokens(1)
    # An activated LoRA says it, whatever is asserted besides.
    activated = write_peft(tmp_path / "alora", factors_for("q"), alora_invocation_tokens=[7, 9])
    made = make_decoder(base, tmp_path / "a", lora=activated, cache_conditioned=True)
    assert made.certificate is not None
    assert made.certificate.tail == Invocation((7, 9))
