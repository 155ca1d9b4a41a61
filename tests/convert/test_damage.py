"""Damaged checkpoints: every file that can be wrong, and what is said about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pshare_jax.convert.inspection import check_hashes
from pshare_jax.convert.manifest import read_manifest
from pshare_jax.convert.orbax import load_weights, open_weights, write_decode, write_prefill
from pshare_jax.errors import CertificateError, CheckpointError
from tests.convert.helpers import TOKENIZER_FILES, model_config, random_weights

CONFIG = model_config()
WEIGHTS = random_weights(CONFIG)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A prefill checkpoint that no test changes."""
    folder = tmp_path_factory.mktemp("saved") / "base"
    write_prefill(folder, CONFIG, WEIGHTS, TOKENIZER_FILES)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A copy to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def data_file(folder: Path, name: str) -> Path:
    return next(p for p in (folder / "weights" / name / "c").rglob("*") if p.is_file())


NAME = "layers.1.attn.k.kernel"


@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "removed", "headless"])
def test_a_damaged_tensor_is_named(copy, damage):
    path = data_file(copy, NAME)
    content = bytearray(path.read_bytes())
    match damage:
        case "truncated":
            path.write_bytes(content[:-100])
        case "emptied":
            path.write_bytes(b"")
        case "flipped":
            content[7] ^= 1
            path.write_bytes(content)
        case "removed":
            path.unlink()
        case _:
            (copy / "weights" / NAME / "zarr.json").unlink()
    with pytest.raises(CheckpointError, match=f"weights/{NAME}: cannot be read") as raised:
        load_weights(copy)
    assert "\n" not in str(raised.value)
    with pytest.raises(CheckpointError, match=NAME):
        open_weights(copy)[NAME].read()


def test_check_hashes_notices_an_exchanged_tensor(copy):
    weights = copy / "weights"
    shutil.rmtree(weights / NAME)
    shutil.copytree(weights / "layers.0.attn.k.kernel", weights / NAME)
    load_weights(copy)
    with pytest.raises(CheckpointError, match=f"tensor {NAME} is not the one that tensors.json"):
        check_hashes(copy)


def test_check_hashes_notices_another_tokenizer(copy):
    check_hashes(copy)
    (copy / "tokenizer" / "tokenizer.json").write_text("{ }")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: missing or changed"):
        check_hashes(copy)


def test_check_hashes_notices_another_fingerprint(copy):
    about = json.loads((copy / "pshare.json").read_text())
    about["config"]["rope_theta"] = 12345.0
    (copy / "pshare.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="fingerprint is not the one of its tensors"):
        check_hashes(copy)


def test_a_misshapen_tensor_is_named(copy):
    weights = copy / "weights"
    shutil.rmtree(weights / NAME)
    shutil.copytree(weights / "layers.1.attn.q.kernel", weights / NAME)
    with pytest.raises(CheckpointError, match=rf"{NAME}: has shape \[48, 4, 16\], but"):
        load_weights(copy)


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("pshare.json", lambda a: a.update(format=2), "pshare.json: format is 2; only 1 is known"),
        ("pshare.json", lambda a: a.pop("dtype"), "pshare.json: dtype is missing"),
        ("pshare.json", lambda a: a["config"].update(size=1), "pshare.json: malformed: .*size"),
        ("pshare.json", lambda a: a["config"].update(num_heads=3), "pshare.json: malformed: num_h"),
        ("pshare.json", lambda a: a.update(kind="decode"), "'decode' and the certificate disagree"),
        ("tensors.json", lambda a: a.pop(NAME), f"tensors.json: tensor {NAME} is missing"),
        (
            "tensors.json",
            lambda a: a[NAME].update(shape=[1, 2]),
            rf"tensor {NAME} has shape \[1, 2\], but its config needs \[48, 2, 16\]",
        ),
        ("tensors.json", lambda a: a[NAME].update(dtype="int8"), "unsupported dtype 'int8'"),
        ("tensors.json", lambda a: a.update(extra=a[NAME]), "tensor extra is unexpected"),
    ],
)
def test_a_malformed_manifest_is_refused(copy, file, edit, message):
    about = json.loads((copy / file).read_text())
    edit(about)
    (copy / file).write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=message):
        read_manifest(copy)


def test_a_malformed_certificate_is_refused(saved, tmp_path):
    write_decode(tmp_path / "m", read_manifest(saved), WEIGHTS, cache_conditioned=True)
    path = tmp_path / "m" / "pshare.json"
    about = json.loads(path.read_text())
    about["certificate"]["tail"] = 0
    path.write_text(json.dumps(about))
    with pytest.raises(CertificateError, match=r"pshare.json: certificate: tail is 0"):
        read_manifest(tmp_path / "m")


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_broken_json_file_is_named(copy, content):
    (copy / "tensors.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tensors.json"):
        read_manifest(copy)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_weights(tmp_path)
