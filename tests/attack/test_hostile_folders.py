"""Hugging Face and PEFT folders, and checkpoints, made to hang, exhaust or crash who reads them."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pshare_jax.convert.__main__ import main
from pshare_jax.convert.manifest import MAX_JSON_BYTES, read_manifest
from pshare_jax.convert.orbax import write_prefill
from pshare_jax.convert.peft import read_lora
from pshare_jax.convert.sources import open_source
from pshare_jax.errors import MAX_MESSAGE, CheckpointError
from tests.attack.bounds import SEEDS, cheap
from tests.convert.helpers import (
    TOKENIZER_FILES,
    model_config,
    random_weights,
    write_hf_folder,
)

CONFIG = model_config()
WEIGHTS = random_weights(CONFIG)
NESTED = "[" * 5000 + "]" * 5000


@pytest.fixture
def folder(tmp_path):
    return write_hf_folder(tmp_path / "hf", CONFIG, WEIGHTS)


def refused(read, path: Path, *words: str) -> None:
    with cheap(), pytest.raises(CheckpointError) as raised:
        read(path)
    message = str(raised.value)
    for word in words:
        assert word in message
    assert message.isprintable()
    assert len(message) <= MAX_MESSAGE + 100


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_json_nested_five_thousand_deep(folder, name):
    (folder / name).write_text('{"a": ' + NESTED + "}")
    refused(open_source, folder, f"{name}: cannot be read: nested too deeply")


def test_json_of_any_size(folder):
    with (folder / "config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    refused(open_source, folder, "config.json: has 67108865 bytes, but may have 67108864")


@pytest.mark.parametrize("number", ["9" * 5000, "1e400", "-1e400", "NaN", "0", "-1", "true", '"x"'])
@pytest.mark.parametrize(
    "field", ["hidden_size", "rms_norm_eps", "rope_theta", "num_hidden_layers"]
)
def test_numbers_that_are_none(folder, field, number):
    path = folder / "config.json"
    about = json.loads(path.read_text()) | {field: "HERE"}
    path.write_text(json.dumps(about).replace('"HERE"', number))
    refused(open_source, folder, "config.json: ")


@pytest.mark.parametrize("layers", [10**9, 10**7, 4097, 4096])
@pytest.mark.parametrize("window", [True, False])
def test_more_layers_than_tensors(folder, layers, window):
    """A list of one entry a layer is made where layers may have windows."""
    change(
        folder / "config.json",
        architectures=["Qwen2ForCausalLM"],
        num_hidden_layers=layers,
        use_sliding_window=window,
        rope_scaling=None,
    )
    refused(open_source, folder)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size", "head_dim"])
def test_sizes_that_do_not_fit_the_tensors(folder, field):
    change(folder / "config.json", **{field: 10**12})
    refused(open_source, folder, "safetensors: tensor ", " has shape ")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b", ""])
def test_an_index_that_names_files_elsewhere(folder, name):
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(open_source, folder, "is not a file beside it")


def test_a_tokenizer_of_any_size(folder):
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate((1 << 28) + 1)
    refused(open_source, folder, "tokenizer.json: has 268435457 bytes, but may have 268435456")


@pytest.mark.parametrize("length", [1 << 40, (1 << 64) - 1, 99_000_000])
def test_a_header_longer_than_the_file(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refused(open_source, folder, "model.safetensors: truncated or corrupt")


def test_a_tensor_longer_than_the_file(folder):
    path = folder / "model.safetensors"
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4 << 40]}})
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(1000))
    refused(open_source, folder, "model.safetensors: truncated or corrupt")


def test_names_reach_the_terminal_without_escape_codes(folder, tmp_path, capsys):
    path = folder / "model.safetensors"
    name = "\x1b]0;owned\x07\x1b[31m\r\u202e"
    save_file({**load_file(path), name: np.zeros(3, np.float32)}, path)
    assert main(["import", str(folder), str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert r"\x1b]0;owned\x07\x1b[31m\r\u202e" in shown
    assert shown.rstrip("\n").isprintable()


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"quantization_config": {"quant_method": "hqq", "x": ["y" * 100] * 9}}, "'hqq'"),
        ({"architectures": ["\x1b[31m" * 1000]}, "supported are LlamaForCausalLM"),
        ({"hidden_size": ["x" * 100_000] * 10}, "must be of type int"),
        ({"rope_scaling": "x" * 100_000}, "must be an object"),
    ],
)
def test_values_are_shown_in_part(folder, field, words):
    change(folder / "config.json", **field)
    refused(open_source, folder, words)
    with pytest.raises(CheckpointError) as raised:
        open_source(folder)
    # What is supported may be a long list; what the file says is short.
    assert len(str(raised.value).partition("; supported")[0]) < 400


def test_a_tokenizer_that_is_none(folder):
    (folder / "tokenizer.json").write_text('{"a": ' + NESTED + "}")
    refused(open_source, folder, "tokenizer.json: not a readable tokenizer")


@pytest.mark.parametrize(
    "options", [{"r": 10**9}, {"r": True}, {"lora_alpha": 1e999}, {"x": [NESTED] * 100}]
)
def test_hostile_adapters(tmp_path, options):
    factors = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((4, 48))}
    save_file(factors, tmp_path / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **options}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    refused(lambda path: read_lora(path, CONFIG), tmp_path)


@pytest.mark.parametrize("number", [10**7, 10**30, 0, -1, 1.5, "2", None, True])
@pytest.mark.parametrize("field", ["num_layers", "num_heads", "head_dim", "vocab_size"])
def test_a_checkpoint_of_impossible_size(tmp_path, field, number):
    write_prefill(tmp_path / "base", CONFIG, WEIGHTS, TOKENIZER_FILES)
    path = tmp_path / "base" / "pshare.json"
    about = json.loads(path.read_text())
    about["config"][field] = number
    path.write_text(json.dumps(about))
    refused(read_manifest, tmp_path / "base")


@pytest.mark.parametrize("name", ["pshare.json", "tensors.json"])
def test_a_checkpoint_nested_five_thousand_deep(tmp_path, name):
    write_prefill(tmp_path / "base", CONFIG, WEIGHTS, TOKENIZER_FILES)
    (tmp_path / "base" / name).write_text('{"format": 1, "config": ' + NESTED + "}")
    refused(read_manifest, tmp_path / "base", name)


@pytest.mark.parametrize("seed", SEEDS)
def test_configurations_with_random_damage(folder, seed):
    """Any value at any place of config.json is refused in a line, or is a model all the same."""
    rng = random.Random(seed)
    path = folder / "config.json"
    about = json.loads(path.read_text())
    values = [None, True, 0, -1, 1.5, 10**18, "", "\x1b", [], [1], {}, {"a": []}, "llama", 1e999]
    messages = []
    for _ in range(60):
        damaged = dict(about)
        for name in rng.sample(sorted(about), rng.choice((1, 2, 5))):
            damaged[name] = rng.choice(values)
        path.write_text(json.dumps(damaged))
        try:
            open_source(folder)
        except CheckpointError as error:
            messages.append(str(error))
    assert all(message.isprintable() for message in messages)
    assert len(messages) > 20
