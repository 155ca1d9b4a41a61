"""Hugging Face folders: import, export, and every way a folder can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pshare_jax.convert import hf, names
from pshare_jax.convert.conversions import export, import_model
from pshare_jax.convert.orbax import load_weights, read_manifest
from pshare_jax.convert.sources import open_source
from pshare_jax.errors import CheckpointError
from pshare_jax.models.registry import config_from_hf
from pshare_jax.models.text_part import text_names
from pshare_jax.text.tokenizer import Tokenizer
from tests.convert.helpers import model_config, random_weights, same_bits, write_hf_folder
from tests.golden import CASES, GOLDEN
from tests.helpers import ARCHITECTURES
from tests.text.tiny import write_byte_level, write_words

CONFIG = model_config()
WEIGHTS = random_weights(CONFIG)


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder to be damaged."""
    return write_hf_folder(tmp_path / "hf", CONFIG, WEIGHTS)


WRAPPED = ("gemma3_vision", "llava", "mistral3")
"""Of these the language model alone is imported."""


@pytest.mark.parametrize("case", WRAPPED)
def test_a_language_model_within_another_is_imported_and_exported_alone(tmp_path, case):
    source = write_words(tmp_path / "source")
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    tensors = {n: t.astype(np.float32) for n, t in tensors.items() if not n.startswith("golden.")}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    about = json.loads((GOLDEN / f"{case}.json").read_text())
    (source / "config.json").write_text(json.dumps(about))
    manifest = import_model(source, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "exported")
    back = load_file(tmp_path / "exported" / "model.safetensors")
    text = {name: stored for stored, name in text_names(tensors).items()}
    assert len(back) == len(names.hf_tensors(manifest.config))
    assert all(same_bits(back[name], tensors[text[name]]) for name in back)
    again = import_model(tmp_path / "exported", tmp_path / "again")
    assert again.config == manifest.config
    assert again.fingerprint == manifest.fingerprint


def rewrite(folder: Path, change) -> None:
    """Edits the tensors of a folder's single file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, "float32") for case in CASES if case not in WRAPPED),
        *((case, "bfloat16") for case in ("llama3", "llama_tied", "gemma3", "mixtral", "phi3")),
    ],
)
def test_export_gives_back_what_was_imported(tmp_path, case, dtype):
    """Tensors and config.json of transformers' own making, bit for bit."""
    source = write_words(tmp_path / "source")
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    tensors = {
        name: value.astype(hf.DTYPES[dtype])
        for name, value in tensors.items()
        if not name.startswith("golden.")
    }
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    about = json.loads((GOLDEN / f"{case}.json").read_text()) | {"dtype": dtype}
    (source / "config.json").write_text(json.dumps(about))

    manifest = import_model(source, tmp_path / "checkpoint")
    assert manifest.config == config_from_hf(about)
    assert manifest.dtype == dtype
    export(tmp_path / "checkpoint", tmp_path / "exported")

    back = load_file(tmp_path / "exported" / "model.safetensors")
    assert set(back) == set(tensors)
    assert all(same_bits(back[name], value) for name, value in tensors.items())
    assert json.loads((tmp_path / "exported" / "config.json").read_text()) == about
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "exported" / name).read_bytes() == (source / name).read_bytes()
    again = import_model(tmp_path / "exported", tmp_path / "again")
    assert again.fingerprint == manifest.fingerprint


def test_values_land_where_the_names_say(folder, tmp_path):
    import_model(folder, tmp_path / "checkpoint")
    loaded = load_weights(tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    query = tensors["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(
        loaded["layers.1.attn.q.kernel"][:, 2, 5], query[2 * CONFIG.head_dim + 5]
    )
    assert all(same_bits(loaded[name], value) for name, value in WEIGHTS.items())


def test_the_tokenizer_comes_along(folder, tmp_path):
    import_model(folder, tmp_path / "checkpoint")
    ours = Tokenizer.load(tmp_path / "checkpoint" / "tokenizer")
    theirs = Tokenizer.load(folder)
    text = "naïve <|im_start|>user 🙂 12"
    assert ours.encode(text) == theirs.encode(text)
    messages = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shards_are_the_same_model(tmp_path, architecture):
    config = model_config(architecture=architecture)
    weights = random_weights(config)
    one = write_hf_folder(tmp_path / "one", config, weights)
    three = write_hf_folder(tmp_path / "three", config, weights, shards=3)
    a = import_model(one, tmp_path / "a")
    b = import_model(three, tmp_path / "b")
    assert a.config == b.config == config
    assert a.fingerprint == b.fingerprint


def test_large_exports_are_sharded(folder, tmp_path, monkeypatch):
    import_model(folder, tmp_path / "checkpoint")
    monkeypatch.setattr(hf, "SHARD_BYTES", 40_000)
    export(tmp_path / "checkpoint", tmp_path / "exported")
    index = json.loads((tmp_path / "exported" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in WEIGHTS.values())
    assert not (tmp_path / "exported" / "model.safetensors").exists()
    tensors = {k: v for f in files for k, v in load_file(tmp_path / "exported" / f).items()}
    assert set(tensors) == set(index["weight_map"])
    original = load_file(folder / "model.safetensors")
    assert all(same_bits(tensors[name], value) for name, value in original.items())


def test_dtype_is_converted_on_request(folder, tmp_path):
    manifest = import_model(folder, tmp_path / "checkpoint", dtype="bfloat16")
    assert manifest.dtype == "bfloat16"
    loaded = load_weights(tmp_path / "checkpoint")
    assert all(
        same_bits(loaded[name], value.astype(ml_dtypes.bfloat16)) for name, value in WEIGHTS.items()
    )
    export(tmp_path / "checkpoint", tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["dtype"] == "bfloat16"


def test_float16_becomes_float32(folder, tmp_path):
    rewrite(folder, lambda t: t.update({k: v.astype(np.float16) for k, v in t.items()}))
    import_model(folder, tmp_path / "checkpoint")
    loaded = load_weights(tmp_path / "checkpoint")
    assert all(
        same_bits(loaded[name], value.astype(np.float16).astype(np.float32))
        for name, value in WEIGHTS.items()
    )


def test_bfloat16_matrices_make_a_bfloat16_model(folder, tmp_path):
    """Norms in float32 beside bfloat16 matrices do not double the model."""
    rewrite(
        folder,
        lambda t: t.update({k: v.astype(ml_dtypes.bfloat16) for k, v in t.items() if v.ndim > 1}),
    )
    assert import_model(folder, tmp_path / "checkpoint").dtype == "bfloat16"


def test_redundant_tensors_are_dropped(tmp_path):
    config = model_config(tie_word_embeddings=True)
    folder = write_hf_folder(tmp_path / "hf", config, random_weights(config))
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    manifest = import_model(folder, tmp_path / "checkpoint")
    assert "lm_head.kernel" not in manifest.tensors


def test_end_tokens_of_the_config_are_kept(folder, tmp_path):
    (folder / "generation_config.json").write_text(json.dumps({"top_p": 0.9}))
    about = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [7, 9]}
    (folder / "config.json").write_text(json.dumps(about))
    import_model(folder, tmp_path / "checkpoint")
    tokenizer = tmp_path / "checkpoint" / "tokenizer"
    assert json.loads((tokenizer / "generation_config.json").read_text()) == {
        "top_p": 0.9,
        "eos_token_id": [7, 9],
    }
    assert Tokenizer.load(tokenizer).eos_token_ids == (7, 9)


def test_a_hub_id_is_downloaded(folder, tmp_path, monkeypatch):
    calls = []

    def snapshot_download(repository, *, revision, allow_patterns):
        calls.append((repository, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = open_source("some-org/some-model@v1")
    assert source.config == CONFIG
    assert calls[0][:2] == ("some-org/some-model", "v1")
    assert {"config.json", "*.safetensors", "tokenizer.json"} <= set(calls[0][2])


def test_a_failing_download_is_one_line(monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"org/model: .*cannot be downloaded: no route$"):
        open_source("org/model")


@pytest.mark.parametrize("source", ["nowhere", "/no/such/folder", "a/b/c", "missing/model.gguf"])
def test_a_source_that_is_nothing(source):
    with pytest.raises(CheckpointError, match="no such file or folder, and not a hub id"):
        open_source(source)


# Damaged folders

UP = "model.layers.1.mlp.up_proj.weight"


def check_refused(folder: Path, dest: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        import_model(folder, dest)
    for word in words:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not dest.exists()
    assert not list(dest.parent.glob(f".{dest.name}*"))


@pytest.mark.parametrize("keep", [0, 5, 700, -1])
def test_a_truncated_file_is_named(folder, tmp_path, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    check_refused(folder, tmp_path / "out", str(path), "truncated or corrupt")


@pytest.mark.parametrize("content", [b"junk" * 100, b"\xff" * 64])
def test_a_corrupt_file_is_named(folder, tmp_path, content):
    path = folder / "model.safetensors"
    path.write_bytes(content)
    check_refused(folder, tmp_path / "out", str(path), "truncated or corrupt")


def test_a_missing_tensor_is_named(folder, tmp_path):
    rewrite(folder, lambda t: t.pop(UP))
    check_refused(folder, tmp_path / "out", str(folder), UP, "missing")


def test_a_misshapen_tensor_is_named(folder, tmp_path):
    rewrite(folder, lambda t: t.update({UP: np.zeros((3, 4), np.float32)}))
    check_refused(folder, tmp_path / "out", "model.safetensors", UP, "[3, 4]", "[64, 48]")


def test_an_unexpected_tensor_is_named(folder, tmp_path):
    rewrite(folder, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[UP].copy()}))
    check_refused(folder, tmp_path / "out", "model.layers.2.mlp.up_proj.weight is unexpected")


def test_an_unsupported_dtype_is_named(folder, tmp_path):
    rewrite(folder, lambda t: t.update({UP: t[UP].astype(np.int8)}))
    check_refused(folder, tmp_path / "out", UP, "dtype I8")


def test_a_missing_shard_is_named(tmp_path):
    folder = write_hf_folder(tmp_path / "hf", CONFIG, WEIGHTS, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    check_refused(folder, tmp_path / "out", "model-00002-of-00003.safetensors: no such file")


def test_a_truncated_shard_is_named(tmp_path):
    folder = write_hf_folder(tmp_path / "hf", CONFIG, WEIGHTS, shards=3)
    path = folder / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    check_refused(folder, tmp_path / "out", "model-00003-of-00003.safetensors: truncated")


def test_a_tensor_missing_from_its_shard_is_named(tmp_path):
    folder = write_hf_folder(tmp_path / "hf", CONFIG, WEIGHTS, shards=2)
    path = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    del tensors[name]
    save_file(tensors, path)
    check_refused(folder, tmp_path / "out", str(path), f"tensor {name} is missing")


def test_a_tensor_that_the_index_does_not_list_is_named(tmp_path):
    """It would be dropped, whatever it changes."""
    folder = write_hf_folder(tmp_path / "hf", CONFIG, WEIGHTS, shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = index["weight_map"].pop(UP)
    path.write_text(json.dumps(index))
    check_refused(folder, tmp_path / "out", name, f"tensor {UP} is not listed as this file's")


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_a_malformed_index_is_named(tmp_path, index):
    folder = write_hf_folder(tmp_path / "hf", CONFIG, WEIGHTS, shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    check_refused(folder, tmp_path / "out", "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ("architectures", "GPT2LMHeadModel")),
        ({"hidden_size": None}, ("hidden_size",)),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor",)),
        ({"rope_scaling": {"rope_type": "yarn"}}, ("rope_scaling.factor is missing",)),
        (
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 10**12},
            ("experts, but the folder has only",),
        ),
    ],
)
def test_an_unsupported_config_is_named(folder, tmp_path, change, words):
    about = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(about))
    check_refused(folder, tmp_path / "out", f"{folder / 'config.json'}: ", *words)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("config.json", "no such file"),
        ("model.safetensors", "(safetensors can be read, and"),
        ("tokenizer.json", "fast tokenizer"),
    ],
)
def test_a_missing_file_is_named(folder, tmp_path, name, word):
    (folder / name).unlink()
    check_refused(folder, tmp_path / "out", str(folder / name), word)


def test_export_without_an_original_config_says_the_same(tmp_path):
    """A checkpoint from GGUF or from training gets a config that reads back as its own."""
    from pshare_jax.convert.orbax import write_prefill

    tokenizer = write_byte_level(tmp_path / "tokenizer")
    files = {path.name: path.read_bytes() for path in tokenizer.iterdir()}
    write_prefill(tmp_path / "checkpoint", CONFIG, WEIGHTS, files)
    export(tmp_path / "checkpoint", tmp_path / "exported")
    about = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config_from_hf(about) == CONFIG
    assert about["dtype"] == "float32"
    assert about["eos_token_id"] == [2, 0]
    again = import_model(tmp_path / "exported", tmp_path / "again")
    assert again.fingerprint == read_manifest(tmp_path / "checkpoint").fingerprint


def test_exported_names_are_transformers(folder, tmp_path):
    import_model(folder, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "exported")
    tensors = load_file(tmp_path / "exported" / "model.safetensors")
    assert set(tensors) == {names.native_to_hf(name, CONFIG) for name in WEIGHTS}
