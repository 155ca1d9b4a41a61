"""GGUF files: tensors, hyper-parameters, and every way a file can be wrong."""

from __future__ import annotations

import dataclasses

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QuantizationType

from pshare_jax.convert import gguf as our_gguf
from pshare_jax.convert.conversions import export, import_model
from pshare_jax.convert.gguf import GGUFFile, unpermute_rope_rows
from pshare_jax.convert.gguf_rope import rope_factors
from pshare_jax.convert.orbax import load_weights
from pshare_jax.convert.sources import open_source
from pshare_jax.errors import CheckpointError
from pshare_jax.models.rope import Llama3RopeScaling, Rope, rope_frequencies
from tests.convert.helpers import (
    add_gguf_config,
    add_gguf_tokenizer,
    gguf_config,
    permute_rope_rows,
    random_weights,
    same_bits,
    write_gguf,
)
from tests.helpers import ARCHITECTURES

CONFIG = gguf_config()
WEIGHTS = random_weights(CONFIG)
GATE = "blk.1.ffn_gate.weight"


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A float32 llama file that no test changes."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, CONFIG, WEIGHTS)
    return path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_comes_back(tmp_path, architecture):
    config = gguf_config(architecture=architecture)
    weights = random_weights(config)
    write_gguf(tmp_path / "model.gguf", config, weights)
    manifest = import_model(tmp_path / "model.gguf", tmp_path / "checkpoint")
    assert manifest.config == config
    assert manifest.dtype == "float32"
    loaded = load_weights(tmp_path / "checkpoint")
    assert all(same_bits(loaded[name], value) for name, value in weights.items())


def test_mistral_may_be_called_so(tmp_path):
    write_gguf(tmp_path / "model.gguf", CONFIG, WEIGHTS, architecture="mistral")
    assert GGUFFile(tmp_path / "model.gguf").config == dataclasses.replace(
        CONFIG, architecture="mistral"
    )


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("block", [1, 1000, 1 << 18])
def test_quantised_tensors_are_what_gguf_makes_of_them(tmp_path, monkeypatch, caplog, kind, block):
    """In blocks of rows of any size; that they are dequantised is said."""
    monkeypatch.setattr(our_gguf, "BLOCK_ELEMENTS", block)
    stored = write_gguf(tmp_path / "m.gguf", CONFIG, WEIGHTS, QuantizationType[kind])
    tensors = open_source(tmp_path / "m.gguf").tensors
    said = [f"the weights are quantised ({kind}); they are" in line for line in caplog.messages]
    assert said == [True] * (kind != "F16")
    for name, value in stored.items():
        assert same_bits(tensors[name].read(), value), name
        matrix = value.ndim > 1
        assert np.max(np.abs(value - WEIGHTS[name])) < 0.02, name
        assert same_bits(value, WEIGHTS[name]) != matrix, name


def test_bfloat16_stays_bfloat16(tmp_path):
    write_gguf(tmp_path / "m.gguf", CONFIG, WEIGHTS, QuantizationType.BF16)
    assert import_model(tmp_path / "m.gguf", tmp_path / "checkpoint").dtype == "bfloat16"
    loaded = load_weights(tmp_path / "checkpoint")
    assert all(
        same_bits(loaded[name], value.astype(ml_dtypes.bfloat16)) for name, value in WEIGHTS.items()
    )


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_k_quants_are_what_gguf_makes_of_them(tmp_path, kind):
    """The package cannot make these: blocks of any bits with tame scales serve as well."""
    config = gguf_config(hidden_size=256, intermediate_size=256)
    quantisation = QuantizationType[kind]
    _, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    raw = np.random.default_rng(0).integers(0, 256, (256, block_bytes), dtype=np.uint8)
    scales = slice(0, 4) if kind == "Q4_K" else slice(208, 210)
    width = scales.stop - scales.start
    raw[:, scales] = np.full((256, width // 2), 0.01, np.float16).view(np.uint8)
    name = "layers.0.mlp.gate.kernel"
    weights = random_weights(config)
    replaced = weights.pop(name)

    def add(writer):
        writer.add_tensor("blk.0.ffn_gate.weight", raw, raw_dtype=quantisation)

    write_gguf(tmp_path / "m.gguf", config, weights, edit=add)
    value = open_source(tmp_path / "m.gguf").tensors[name].read()
    assert value.shape == replaced.shape
    np.testing.assert_array_equal(value, gguf.dequantize(raw, quantisation).T)
    assert 0.01 < np.std(value) < 100


def test_rope_rows_are_put_back():
    rows = np.arange(3 * 8 * 5).reshape(24, 5)
    permuted = permute_rope_rows(rows, 3)
    assert not np.array_equal(permuted, rows)
    np.testing.assert_array_equal(unpermute_rope_rows(permuted, 8), rows)


@pytest.mark.parametrize("factor", [8.0, 32.0, 16.0])
def test_llama3_scaling_is_recognised(tmp_path, factor):
    scaling = Llama3RopeScaling(factor, 1.0, 4.0, 8192)
    config = gguf_config(rope_scaling=scaling, rope_theta=500000.0, head_dim=64)
    factors = rope_factors(scaling, 64, 500000.0)
    write_gguf(
        tmp_path / "m.gguf",
        config,
        random_weights(config),
        edit=lambda writer: writer.add_tensor("rope_freqs.weight", factors),
    )
    assert GGUFFile(tmp_path / "m.gguf").config == config


def test_rope_factors_are_llama3s():
    """Factor 1 for short wavelengths, the full factor for long ones, between them in between."""
    scaling = Llama3RopeScaling(8.0, 1.0, 4.0, 8192)
    factors = rope_factors(scaling, 128, 500000.0)
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(0, 128, 2) / 128)
    np.testing.assert_array_equal(factors[wavelengths < 8192 / 4], 1)
    np.testing.assert_array_equal(factors[wavelengths > 8192], 8)
    between = factors[(wavelengths > 8192 / 4) & (wavelengths < 8192)]
    assert len(between) > 2
    assert np.all(np.diff(between) > 0)
    assert 1 < between[0] < between[-1] < 8


# Damaged and unsupported files


def check_refused(path, dest, *words):
    with pytest.raises(CheckpointError) as raised:
        import_model(path, dest)
    for word in (str(path), *words):
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not dest.exists()


def test_a_file_cut_anywhere_is_refused(intact, tmp_path):
    """In the header, the metadata, the tensor table, and the data."""
    content = intact.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(0, len(content), len(content) // 40), len(content) - 1]:
        path.write_bytes(content[:size])
        check_refused(path, tmp_path / "out")


def test_a_cut_off_tensor_is_named(intact, tmp_path):
    reader = gguf.GGUFReader(intact)
    tensor = next(t for t in reader.tensors if t.name == GATE)
    path = tmp_path / "cut.gguf"
    path.write_bytes(intact.read_bytes()[: int(tensor.data_offset) + 1000])
    check_refused(path, tmp_path / "out", f"tensor {GATE}: truncated")


def test_a_file_that_shrinks_while_it_is_read(intact, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(intact.read_bytes())
    tensors = open_source(path).tensors
    path.write_bytes(intact.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"m\.gguf: tensor .*: truncated"):
        tensors["lm_head.kernel"].read()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"m\.gguf: tensor output.weight: No such file"):
        tensors["lm_head.kernel"].read()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"junk" * 1000, b"GGUF" + b"\xff" * 1000])
def test_a_file_that_is_no_gguf(tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    check_refused(path, tmp_path / "out", "not a GGUF file, or truncated or corrupt")


def test_an_unknown_architecture_is_named(tmp_path):
    write_gguf(tmp_path / "m.gguf", CONFIG, WEIGHTS, architecture="starcoder2")
    check_refused(tmp_path / "m.gguf", tmp_path / "out", "architecture 'starcoder2'", "qwen3")


@pytest.mark.parametrize(
    ("name", "gguf_name"),
    [
        ("layers.1.mlp.gate.kernel", GATE),
        ("embed.embedding", "token_embd.weight"),
        ("final_norm.scale", "output_norm.weight"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, name, gguf_name):
    weights = {key: value for key, value in WEIGHTS.items() if key != name}
    write_gguf(tmp_path / "m.gguf", CONFIG, weights)
    check_refused(tmp_path / "m.gguf", tmp_path / "out", f"tensor {gguf_name} is missing")


def test_a_misshapen_tensor_is_named(tmp_path):
    write_gguf(
        tmp_path / "m.gguf",
        CONFIG,
        {k: v for k, v in WEIGHTS.items() if k != "layers.1.mlp.gate.kernel"},
        edit=lambda writer: writer.add_tensor(GATE, np.zeros((3, 64), np.float32)),
    )
    check_refused(tmp_path / "m.gguf", tmp_path / "out", GATE, "[3, 64]", "[96, 64]")


def test_an_unexpected_tensor_is_named(tmp_path):
    write_gguf(
        tmp_path / "m.gguf",
        CONFIG,
        WEIGHTS,
        # The first layer has none, and so the model.
        edit=lambda writer: writer.add_tensor("blk.1.attn_q.bias", np.zeros(64, np.float32)),
    )
    check_refused(tmp_path / "m.gguf", tmp_path / "out", "tensor blk.1.attn_q.bias is unexpected")


def test_an_integer_tensor_is_refused(tmp_path):
    write_gguf(
        tmp_path / "m.gguf",
        CONFIG,
        {k: v for k, v in WEIGHTS.items() if k != "layers.1.mlp.gate.kernel"},
        edit=lambda writer: writer.add_tensor(GATE, np.zeros((96, 64), np.int32)),
    )
    check_refused(tmp_path / "m.gguf", tmp_path / "out", GATE, "type I32 cannot be dequantized")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda w: w.add_expert_count(8), ("metadata llama.expert_used_count is missing",)),
        (lambda w: w.add_uint16("split.count", 3), ("one of 3 parts",)),
        (
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            ("rope.scaling.type is 'longrope'; supported are 'none', 'linear' and 'yarn'",),
        ),
        (
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            ("rope.scaling.factor is missing",),
        ),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.linspace(0, 9, 8, dtype=np.float32)),
            ("tensor rope_freqs.weight: holds no positive factors",),
        ),
    ],
)
def test_what_the_decoder_cannot_compute_is_named(tmp_path, edit, words):
    write_gguf(tmp_path / "m.gguf", CONFIG, WEIGHTS, edit=edit)
    check_refused(tmp_path / "m.gguf", tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("llama.block_count", "metadata llama.block_count is missing"),
        ("llama.embedding_length", "metadata llama.embedding_length is missing"),
        ("llama.attention.layer_norm_rms_epsilon", "rms_epsilon is missing"),
        ("tokenizer.ggml.tokens", "metadata tokenizer.ggml.tokens is missing"),
        ("tokenizer.ggml.merges", "metadata tokenizer.ggml.merges is missing"),
    ],
)
def test_missing_metadata_is_named(tmp_path, key, words):
    write_gguf(
        tmp_path / "m.gguf",
        CONFIG,
        WEIGHTS,
        edit=lambda writer: writer.kv_data[0].pop(key),
    )
    check_refused(tmp_path / "m.gguf", tmp_path / "out", words)


def test_metadata_of_another_type_is_named(tmp_path):
    def edit(writer):
        writer.kv_data[0].pop("llama.block_count")
        writer.add_string("llama.block_count", "two")

    write_gguf(tmp_path / "m.gguf", CONFIG, WEIGHTS, edit=edit)
    check_refused(tmp_path / "m.gguf", tmp_path / "out", "llama.block_count is 'two', not int")


def test_a_partial_rotation_is_refused(tmp_path):
    def edit(writer):
        writer.kv_data[0].pop("llama.rope.dimension_count")
        writer.add_rope_dimension_count(8)

    write_gguf(tmp_path / "m.gguf", CONFIG, WEIGHTS, edit=edit)
    check_refused(tmp_path / "m.gguf", tmp_path / "out", "rope.dimension_count is 8")


# Models in several files


def write_split(folder, parts: int = 3):
    """A model as llama.cpp's `llama-gguf-split` cuts it, and the tensors of the whole."""
    whole = folder / "whole" / "m.gguf"
    write_gguf(whole, CONFIG, WEIGHTS)
    reader = gguf.GGUFReader(whole)
    for part in range(parts):
        path = folder / f"m-{part + 1:05d}-of-{parts:05d}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if part == 0:
            add_gguf_config(writer, CONFIG)
            add_gguf_tokenizer(writer, folder / "whole" / "source_tokenizer")
        else:
            writer.kv_data[0].pop("general.architecture")
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[part::parts]:
            writer.add_tensor(tensor.name, np.asarray(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return GGUFFile(whole)


@pytest.mark.parametrize("named", [1, 3])
def test_a_split_model_is_one(tmp_path, named):
    whole = write_split(tmp_path)
    source = open_source(tmp_path / f"m-{named:05d}-of-00003.gguf")
    assert source.config == whole.config
    assert "tokenizer.json" in source.tokenizer_files
    for name, tensor in whole.tensors().items():
        assert same_bits(source.tensors[name].read(), tensor.read()), name


def test_a_split_model_without_a_part(tmp_path):
    write_split(tmp_path)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf: no such file; .* 3 parts"):
        open_source(tmp_path / "m-00001-of-00003.gguf")


def test_parts_that_are_not_of_one_split(tmp_path):
    write_split(tmp_path)
    (tmp_path / "m-00001-of-00003.gguf").rename(tmp_path / "m-00003-of-00003.gguf")
    (tmp_path / "m-00002-of-00003.gguf").rename(tmp_path / "m-00001-of-00003.gguf")
    (tmp_path / "m-00002-of-00003.gguf").write_bytes(
        (tmp_path / "m-00003-of-00003.gguf").read_bytes()
    )
    with pytest.raises(CheckpointError, match="another part of another split"):
        open_source(tmp_path / "m-00003-of-00003.gguf")


def test_rope_factors_of_no_known_scaling_divide_frequencies(tmp_path):
    factors = np.linspace(1, 9, 8, dtype=np.float32)
    write_gguf(
        tmp_path / "m.gguf",
        CONFIG,
        WEIGHTS,
        edit=lambda writer: writer.add_tensor("rope_freqs.weight", factors),
    )
    rope = GGUFFile(tmp_path / "m.gguf").config.layer(0).rope
    plain = rope_frequencies(Rope(rope.theta), CONFIG.head_dim)
    np.testing.assert_allclose(rope_frequencies(rope, CONFIG.head_dim), plain / factors, rtol=1e-6)
    manifest = import_model(tmp_path / "m.gguf", tmp_path / "base")
    assert manifest.config.layer(0).rope == rope
    export(tmp_path / "base", tmp_path / "out")
    assert open_source(tmp_path / "out").config == manifest.config
