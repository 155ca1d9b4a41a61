"""Changed checkpoints do not start: what is found without reading the tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pshare_jax.convert.__main__ import main
from pshare_jax.convert.conversions import import_model, make_decoder
from pshare_jax.convert.orbax import load_weights, open_weights, write_prefill
from pshare_jax.convert.seals import SEALS_FILE, open_checkpoint
from pshare_jax.errors import CheckpointError
from tests.convert.helpers import (
    TOKENIZER_FILES,
    model_config,
    random_weights,
    write_hf_folder,
)
from tests.convert.test_decoder import factors_for, write_peft

CONFIG = model_config()
NAME = "layers.1.attn.k.kernel"
OTHER = "layers.0.attn.k.kernel"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base, a copy and a LoRA module of it, which no test changes."""
    root = tmp_path_factory.mktemp("saved")
    write_hf_folder(root / "hf", CONFIG, random_weights(CONFIG))
    import_model(root / "hf", root / "base")
    make_decoder(root / "base", root / "full", cache_conditioned=True)
    peft = write_peft(root / "peft", factors_for("q", "k"))
    make_decoder(root / "base", root / "lora", lora=peft)
    return root


@pytest.fixture(params=["sealed", "before seals"])
def sealed(request):
    """Whether the checkpoint has seals; those made before there were any must open too."""
    return request.param == "sealed"


@pytest.fixture
def base(saved, tmp_path):
    return Path(shutil.copytree(saved / "base", tmp_path / "base"))


def edit_json(path: Path, edit) -> None:
    about = json.loads(path.read_text())
    edit(about)
    path.write_text(json.dumps(about))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(folder)
    for word in words:
        assert word in str(raised.value)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("kind", ["base", "full", "lora"])
def test_what_was_not_changed_opens(saved, tmp_path, kind, sealed):
    folder = Path(shutil.copytree(saved / kind, tmp_path / "copy"))
    if not sealed:
        (folder / SEALS_FILE).unlink()
    manifest = open_checkpoint(folder)
    assert manifest.fingerprint == open_checkpoint(saved / kind).fingerprint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_family_opens(tmp_path, architecture, dtype):
    config = model_config(architecture=architecture)
    weights = random_weights(config, dtype=dtype)
    write_prefill(tmp_path / "base", config, weights, TOKENIZER_FILES)
    assert open_checkpoint(tmp_path / "base").config == config


def swap_ids(folder: Path) -> None:
    def edit(about):
        vocabulary = about["model"]["vocab"]
        first, second = list(vocabulary)[10:12]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    edit_json(folder / "tokenizer" / "tokenizer.json", edit)


def change_sha(folder: Path) -> None:
    edit_json(folder / "tensors.json", lambda a: a[NAME].update(sha256="0" * 64))


def change_fingerprint(folder: Path) -> None:
    edit_json(folder / "pshare.json", lambda a: a.update(fingerprint="0" * 64))


def change_theta(folder: Path) -> None:
    edit_json(folder / "pshare.json", lambda a: a["config"].update(rope_theta=1e5))


def change_window(folder: Path) -> None:
    edit_json(folder / "pshare.json", lambda a: a["config"].update(sliding_window=7))


def change_dtype(folder: Path) -> None:
    path = folder / "weights" / NAME / "zarr.json"
    edit_json(path, lambda a: a.update(data_type="int32", fill_value=0))


def truncate(folder: Path) -> None:
    path = folder / "weights" / NAME / "c" / "0" / "0" / "0"
    path.write_bytes(path.read_bytes()[:-8])


def remove_layer(folder: Path) -> None:
    shutil.rmtree(folder / "weights" / NAME)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap_ids, "tokenizer.json: changed since"),
        (change_sha, "the fingerprint is not the one of its tensors"),
        (change_fingerprint, "the fingerprint is not the one of its tensors"),
        (change_theta, "the fingerprint is not the one of its tensors"),
        (change_window, "the fingerprint is not the one of its tensors"),
        (change_dtype, f"weights/{NAME}: is stored as int32"),
        (truncate, f"weights/{NAME}: cannot be read: has 6180 bytes instead of 6188"),
        (remove_layer, f"weights/{NAME}: cannot be read: No such file"),
    ],
)
def test_what_the_fingerprint_covers_is_checked(base, sealed, change, words):
    if not sealed:
        (base / SEALS_FILE).unlink()
    open_checkpoint(base)
    change(base)
    refused(base, words)


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads"])
def test_ten_million_layers_are_refused(base, field):
    edit_json(base / "pshare.json", lambda a: a["config"].update({field: 10_000_000}))
    refused(base, "pshare.json: malformed: num_")


def swap_layers(folder: Path) -> None:
    weights = folder / "weights"
    (weights / NAME).rename(weights / "x")
    (weights / OTHER).rename(weights / NAME)
    (weights / "x").rename(weights / OTHER)


def change_template(folder: Path) -> None:
    edit_json(
        folder / "tokenizer" / "tokenizer_config.json", lambda a: a.update(chat_template="{{ x }}")
    )


def add_template(folder: Path) -> None:
    (folder / "tokenizer" / "chat_template.jinja").write_text("{{ x }}")


def remove_end_tokens(folder: Path) -> None:
    (folder / "tokenizer" / "generation_config.json").unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap_layers, f"weights/{OTHER}: is not the tensor that was converted"),
        (change_template, "tokenizer_config.json: changed since the conversion; restore it"),
        (add_template, "chat_template.jinja: added since the conversion"),
        (remove_end_tokens, "generation_config.json: removed since the conversion"),
        (lambda f: (f / SEALS_FILE).write_text("{}"), "seals.json: malformed"),
        (lambda f: (f / SEALS_FILE).write_text("["), "seals.json: cannot be read"),
    ],
)
def test_what_only_the_seals_cover(base, change, words):
    change(base)
    refused(base, words)


def test_a_certificate_that_was_changed(saved, tmp_path):
    """Nothing but the seals notices a module that claims to have been trained on the base's KV."""
    folder = Path(shutil.copytree(saved / "lora", tmp_path / "lora"))
    edit_json(folder / "pshare.json", lambda a: a["certificate"].update(cache_conditioned=True))
    refused(folder, "pshare.json: changed since the conversion")


def test_a_rank_that_was_changed(saved, tmp_path):
    folder = Path(shutil.copytree(saved / "lora", tmp_path / "lora"))
    (folder / SEALS_FILE).unlink()
    edit_json(folder / "pshare.json", lambda a: a["certificate"].update(lora_alpha=80.0))
    refused(folder, "the fingerprint is not the one of its tensors")


def test_no_value_can_change_without_its_seal(base):
    """A tensor that is rewritten as tensorstore writes, with checksums that fit."""
    from pshare_jax.convert.zarr import chunk_shape, write_tensor
    from pshare_jax.models.weights import weight_specs

    value = open_weights(base)[NAME].read()
    changed = np.array(value)
    changed[0, 0, 0] = np.nextafter(changed[0, 0, 0], np.float32(9))
    path = base / "weights" / NAME
    for array, opens in ((changed, False), (value, True)):
        shutil.rmtree(path)
        write_tensor(path, array, chunk_shape(weight_specs(CONFIG)[NAME]))
        if opens:
            open_checkpoint(base)
        else:
            refused(base, f"weights/{NAME}: is not the tensor")


def test_another_dtype_is_not_cast_in_silence(base):
    change_dtype(base)
    with pytest.raises(CheckpointError, match=r"dtype int32, but tensors\.json says"):
        load_weights(base)


def test_a_change_that_was_meant_is_accepted(base, capsys):
    change_template(base)
    assert main(["inspect", "--accept", str(base)]) == 0
    open_checkpoint(base)
    swap_ids(base)
    assert main(["inspect", "--accept", str(base)]) == 2
    assert "tokenizer.json: missing or changed" in capsys.readouterr().err


def test_an_old_checkpoint_gets_seals(base):
    (base / SEALS_FILE).unlink()
    assert main(["inspect", "--accept", str(base)]) == 0
    swap_layers(base)
    refused(base, "is not the tensor that was converted")
    assert main(["inspect", "--accept", str(base)]) == 2
    refused(base, "is not the tensor that was converted")


def test_a_decoder_of_a_changed_base_is_not_made(base, tmp_path):
    swap_layers(base)
    with pytest.raises(CheckpointError, match="is not the tensor that was converted"):
        make_decoder(base, tmp_path / "m")
    assert not (tmp_path / "m").exists()
