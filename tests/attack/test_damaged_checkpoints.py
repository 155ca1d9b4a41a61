"""Checkpoints with random damage: none of it is served."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from pshare_jax.convert.conversions import import_model, make_decoder
from pshare_jax.convert.orbax import load_weights, read_tokenizer_files
from pshare_jax.convert.seals import open_checkpoint
from pshare_jax.errors import CheckpointError
from tests.attack.bounds import SEEDS
from tests.convert.helpers import model_config, random_weights, write_hf_folder
from tests.convert.test_decoder import factors_for, write_peft

CONFIG = model_config()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    write_hf_folder(root / "hf", CONFIG, random_weights(CONFIG))
    import_model(root / "hf", root / "base")
    make_decoder(root / "base", root / "lora", lora=write_peft(root / "peft", factors_for("q")))
    return root


def load(folder: Path):
    """All that serving reads of a checkpoint."""
    manifest = open_checkpoint(folder)
    weights = {name: np.asarray(value) for name, value in load_weights(manifest).items()}
    files = read_tokenizer_files(manifest) if manifest.kind == "prefill" else {}
    about = (manifest.config, manifest.certificate, manifest.fingerprint, manifest.source_config)
    return about, files, weights


def damaged(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content))
    match rng.choice(("flip", "overwrite", "cut", "insert", "empty")):
        case "flip":
            return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
        case "overwrite":
            return content[:at] + rng.randbytes(1) * 16 + content[at + 16 :]
        case "cut":
            return content[:at]
        case "insert":
            return content[:at] + rng.randbytes(3) + content[at:]
        case _:
            return b""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["base", "lora"])
def test_damage_is_refused_or_without_effect(saved, tmp_path, kind, seed):
    rng = random.Random(seed)
    whole = load(saved / kind)
    folder = Path(shutil.copytree(saved / kind, tmp_path / "copy"))
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    messages = []
    for path in rng.choices(paths, k=25):
        content = path.read_bytes()
        path.write_bytes(damaged(rng, content))
        try:
            about, files, weights = load(folder)
        except CheckpointError as error:
            messages.append(str(error))
        else:
            assert (about, files) == whole[:2], path
            assert all(np.array_equal(weights[name], whole[2][name]) for name in whole[2]), path
        path.write_bytes(content)
    assert len(messages) > 15
    assert all(message.isprintable() for message in messages)


@pytest.mark.parametrize("seed", SEEDS)
def test_exchanged_files_are_refused(saved, tmp_path, seed):
    """Two files of one size change places, as a careless copy makes them."""
    rng = random.Random(seed)
    folder = Path(shutil.copytree(saved / "base", tmp_path / "copy"))
    data = sorted(path for path in folder.rglob("c/**/*") if path.is_file())
    for _ in range(10):
        first = rng.choice(data)
        twins = [p for p in data if p != first and p.stat().st_size == first.stat().st_size]
        if not twins:
            continue
        second = rng.choice(twins)
        contents = first.read_bytes(), second.read_bytes()
        first.write_bytes(contents[1])
        second.write_bytes(contents[0])
        with pytest.raises(CheckpointError, match="is not the tensor that was converted"):
            open_checkpoint(folder)
        first.write_bytes(contents[0])
        second.write_bytes(contents[1])
    open_checkpoint(folder)
