"""Checkpoints and modules that state what an earlier version called them stay valid."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from pshare_jax.config import ModelEntry, ServeConfig
from pshare_jax.convert.conversions import export, make_decoder
from pshare_jax.convert.inspection import check_hashes
from pshare_jax.convert.manifest import Manifest, read_manifest
from pshare_jax.convert.orbax import open_weights, write_decode, write_prefill
from pshare_jax.convert.verify import load_model
from pshare_jax.engine.sources import checkpoint_sources
from pshare_jax.errors import CertificateError, CheckpointError
from pshare_jax.models.weights import lora_specs
from tests.convert.helpers import TOKENIZER_FILES, model_config, random_tensors, random_weights

CONFIG = model_config()
FACTORS = random_tensors(lora_specs(CONFIG, 2, ("q",)))


FIELDS = (
    *("architecture", "vocab_size", "hidden_size", "intermediate_size", "num_layers"),
    *("num_heads", "num_kv_heads", "head_dim", "rope_theta", "rope_scaling", "rms_norm_eps"),
    *("max_position_embeddings", "tie_word_embeddings", "qkv_bias", "qk_norm", "sliding_window"),
)
"""All that a configuration had then."""


def version_1(manifest: Manifest, context: str) -> str:
    """The digest as it was before there were versions."""
    config = dataclasses.asdict(manifest.config)
    content = {
        "config": {name: config[name] for name in FIELDS},
        "tensors": {name: entry.sha256 for name, entry in manifest.tensors.items()},
        "tokenizer": context,
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def edit(folder: Path, **changes) -> None:
    """Changes what a checkpoint states; keys of its certificate too."""
    about = json.loads((folder / "pshare.json").read_text())
    for key, value in changes.items():
        (about if key in about else about["certificate"])[key] = value
    (folder / "pshare.json").write_text(json.dumps(about))
    # Checkpoints of that time had none.
    (folder / "seals.json").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A prefill checkpoint of an earlier version."""
    folder = tmp_path_factory.mktemp("former") / "base"
    manifest = write_prefill(folder, CONFIG, random_weights(CONFIG), TOKENIZER_FILES)
    edit(folder, fingerprint=version_1(manifest, manifest.tokenizer_hash))
    return folder


def stated(folder: Path) -> str:
    return json.loads((folder / "pshare.json").read_text())["fingerprint"]


def write_former(base: Path, folder: Path, *, alpha: float | None) -> str:
    """Writes a decode module of an earlier version; gives the base's name in it."""
    manifest, name = read_manifest(base), stated(base)
    if alpha is None:
        made = write_decode(folder, manifest, open_weights(manifest), cache_conditioned=True)
        own = version_1(made, made.tokenizer_hash)
    else:
        lora = {"lora_rank": 2, "lora_alpha": alpha, "lora_targets": ("q",)}
        made = write_decode(folder, manifest, FACTORS, cache_conditioned=True, **lora)
        own = version_1(made, f"{name} 2 {alpha}")
    edit(folder, fingerprint=own, weights_fingerprint=own, prefill_fingerprint=name)
    return name


def test_a_base_is_read_by_its_current_name(base):
    before = (base / "pshare.json").read_bytes()
    manifest = check_hashes(base)
    assert manifest.former == (stated(base),)
    assert manifest.fingerprint not in manifest.former
    assert manifest.current(stated(base)) == manifest.fingerprint
    assert manifest.current("another") == "another"
    assert (base / "pshare.json").read_bytes() == before


@pytest.mark.parametrize("alpha", [None, 4.0, 4, 0.5])
def test_a_module_is_served_beside_its_base(base, tmp_path, alpha):
    name = write_former(base, tmp_path / "m", alpha=alpha)
    manifest = check_hashes(tmp_path / "m")
    certificate = manifest.certificate
    assert certificate is not None
    assert certificate.prefill_fingerprint == name
    assert certificate.weights_fingerprint == manifest.fingerprint != stated(tmp_path / "m")
    config = ServeConfig(str(base), [ModelEntry("m", str(tmp_path / "m"))])
    source, [served] = checkpoint_sources(config, "float32")
    assert source.fingerprint == read_manifest(base).fingerprint
    assert served.certificate == certificate
    assert load_model(tmp_path / "m", base).config == CONFIG
    export(tmp_path / "m", tmp_path / "exported", base=base)


def test_a_copy_of_the_base_still_has_its_name(base, tmp_path):
    write_former(base, tmp_path / "m", alpha=None)
    assert read_manifest(tmp_path / "m").fingerprint == read_manifest(base).fingerprint


def test_a_module_of_an_earlier_version_has_the_weights_of_a_new_one(base, tmp_path):
    write_former(base, tmp_path / "former", alpha=4.0)
    lora = {"lora_rank": 2, "lora_alpha": 4, "lora_targets": ("q",)}
    write_decode(tmp_path / "m", read_manifest(base), FACTORS, cache_conditioned=True, **lora)
    former, new = (read_manifest(tmp_path / name).certificate for name in ("former", "m"))
    assert former is not None
    assert new is not None
    assert former.weights_fingerprint == new.weights_fingerprint
    assert new.prefill_fingerprint == read_manifest(base).fingerprint


def test_what_was_exported_comes_back(base, tmp_path):
    name = write_former(base, tmp_path / "m", alpha=4.0)
    export(tmp_path / "m", tmp_path / "out")
    statement = json.loads((tmp_path / "out" / "pshare_certificate.json").read_text())
    assert statement == {"prefill_fingerprint": name, "tail": 1, "cache_conditioned": True}
    again = make_decoder(base, tmp_path / "again", lora=tmp_path / "out").certificate
    assert again is not None
    assert again.prefill_fingerprint == read_manifest(base).fingerprint


def test_another_base_is_refused(base, tmp_path):
    write_former(base, tmp_path / "m", alpha=4.0)
    write_prefill(tmp_path / "other", CONFIG, random_weights(CONFIG, seed=5), TOKENIZER_FILES)
    config = ServeConfig(str(tmp_path / "other"), [ModelEntry("m", str(tmp_path / "m"))])
    with pytest.raises(CertificateError, match="m: made for the base"):
        checkpoint_sources(config, "float32")
    with pytest.raises(CertificateError, match="is not the base"):
        load_model(tmp_path / "m", tmp_path / "other")


@pytest.mark.parametrize("field", ["fingerprint", "weights_fingerprint"])
def test_a_name_of_other_weights_is_refused(base, tmp_path, field):
    write_former(base, tmp_path / "m", alpha=4.0)
    edit(tmp_path / "m", **{field: stated(base)})
    with pytest.raises(CheckpointError, match="the fingerprint is not the one of its tensors"):
        read_manifest(tmp_path / "m")
