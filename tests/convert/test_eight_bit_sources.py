"""Which sources of 8 bits are kept as they are, which are dequantised and which refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pshare_jax.convert import hf
from pshare_jax.convert.conversions import import_model
from pshare_jax.convert.quantised import eight_bit_weights
from pshare_jax.convert.schemes import read_scheme
from pshare_jax.convert.tensors import FP8, INT8, as_lazy
from pshare_jax.errors import CheckpointError
from tests.convert.eight_bits import (
    bytes_of,
    numbers_of,
    write_folder,
    written_by_compressed_tensors,
)
from tests.convert.helpers import (
    model_config,
    random_weights,
    save_safetensors,
    write_hf_folder,
)
from tests.convert.test_quantised import packed


@pytest.mark.parametrize(
    ("parts", "kept"),
    [
        ({"weight_zero_point": lambda shape: np.zeros((shape[0], 1), np.int8)}, True),
        ({"weight_zero_point": lambda shape: np.ones((shape[0], 1), np.int8)}, False),
        ({"weight_scale": lambda shape: np.full((shape[0], 2), 0.01, np.float32)}, False),
        ({"weight_scale": lambda shape: np.full(1, 0.01, np.float32)}, True),
    ],
    ids=["zeros of 0", "other zeros", "scales of groups", "a scale of all"],
)
def test_what_has_no_scale_for_each_output_is_dequantised(parts, kept, tmp_path):
    write_folder(tmp_path / "hf", **parts)
    base = import_model(tmp_path / "hf", tmp_path / "base")
    assert base.weights == ("int8" if kept else "plain")
    assert base.dtype == ("bfloat16" if kept else "float32")


def test_one_projection_that_was_left_alone_makes_a_dequantised_folder(tmp_path):
    quantised = write_folder(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    module = "model.layers.1.mlp.down_proj"
    names = hf.files_in(path.parent, path.name)
    tensors = {name: hf.lazy_tensor(path, name, raw=True).read() for name in names}
    tensors[f"{module}.weight"] = np.ones(quantised[module][0].shape, np.float32)
    del tensors[f"{module}.weight_scale"]
    save_safetensors(path, tensors)
    assert import_model(tmp_path / "hf", tmp_path / "base").weights == "plain"


def test_an_untied_head_is_plain(tmp_path):
    config = model_config(tie_word_embeddings=True)
    write_hf_folder(tmp_path / "hf", config, random_weights(config))
    assert import_model(tmp_path / "hf", tmp_path / "a", untie_head=True).weights == "plain"


@pytest.mark.parametrize(
    ("scheme", "how", "dtype"),
    [
        ("w8-channel", "pack", INT8),
        ("int8", "int", INT8),
        ("fp8", "float", FP8),
        ("fp8-tensor", "float", FP8),
    ],
)
def test_what_their_library_has_written(scheme, how, dtype):
    about = {"quant_method": "compressed-tensors", "format": f"{how}-quantized"}
    about |= {"config_groups": {"group_0": {"weights": {"num_bits": 8}, "targets": ["Linear"]}}}
    parts, expected = written_by_compressed_tensors(scheme)
    found = read_scheme({"quantization_config": about})
    assert found is not None
    (whole,) = eight_bit_weights(found, parts).values()
    numbers, scale = whole.numbers.read(), whole.scale.read()
    assert (numbers.dtype, numbers.shape) == (dtype, whole.numbers.shape)
    assert scale.shape == numbers.shape[:1]
    np.testing.assert_allclose(
        numbers.astype(np.float32) * scale[:, None], expected, rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize(
    ("shape", "block", "kept"),
    [
        ((), None, True),
        ((1,), None, True),
        ((64,), None, True),
        ((64, 1), None, True),
        ((1, 64), None, False),
        ((2, 1), [32, 32], False),
        ((1, 1), [128, 128], False),
    ],
)
def test_fp8_with_a_scale_of_all_or_of_each_output(shape, block, kept):
    about = {"quant_method": "fp8"} | ({"weight_block_size": block} if block else {})
    scheme = read_scheme({"quantization_config": about})
    assert scheme is not None
    numbers = numbers_of((64, 32), 0, "fp8")
    scales = np.random.default_rng(1).uniform(0.01, 0.02, shape)
    scales = np.asarray(scales, ml_dtypes.bfloat16)
    parts = {"a.weight": as_lazy(numbers), "a.weight_scale": as_lazy(scales)}
    parts["a.input_scale"] = as_lazy(np.ones(1, np.float32))
    found = eight_bit_weights(scheme, parts)
    if not kept:
        assert not found
        return
    np.testing.assert_array_equal(bytes_of(found["a.weight"].numbers.read()), bytes_of(numbers))
    expected = np.broadcast_to(scales.astype(np.float32).reshape(-1), 64)
    np.testing.assert_array_equal(found["a.weight"].scale.read(), expected)


@pytest.mark.parametrize("dequantise", [False, True])
@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("weight", np.uint8(0x7F).view(FP8), r"nan at \[3, 0\]"),
        ("weight", np.uint8(0xFF).view(FP8), r"nan at \[3, 0\]"),
        ("weight_scale", np.nan, r"nan at \[3, 0\]"),
        ("weight_scale", np.inf, r"inf at \[3, 0\]"),
        ("weight_scale", np.asarray(np.nan, np.float32), r"nan at \[\]"),
    ],
    ids=["NaN", "-NaN", "a scale of NaN", "an infinite scale", "a scale of all"],
)
def test_fp8_that_is_not_finite_is_refused(part, value, words, dequantise, tmp_path):
    name = f"model.layers.1.mlp.down_proj.{part}"
    write_folder(tmp_path / "hf", "fp8")
    path = tmp_path / "hf" / "model.safetensors"
    names = hf.files_in(path.parent, path.name)
    tensors = {name: hf.lazy_tensor(path, name, raw=True).read() for name in names}
    if isinstance(value, np.ndarray):
        tensors[name] = value
    else:
        tensors[name][3, 0] = value
    save_safetensors(path, tensors)
    with pytest.raises(CheckpointError, match=rf"tensor {name}: is {words}"):
        import_model(tmp_path / "hf", tmp_path / "base", dequantise=dequantise)
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize("zero", [128, 127])
def test_gptq_of_8_bits_with_a_scale_an_output(zero):
    numbers = numbers_of((64, 32), 0)
    about = {"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"}
    scales = np.random.default_rng(1).uniform(0.01, 0.02, (1, 64)).astype(np.float16)
    parts = {
        "a.qweight": packed((numbers.T.astype(int) + 128), 8, 0),
        "a.qzeros": packed(np.full((1, 64), zero), 8, 1),
        "a.scales": scales,
        "a.g_idx": np.zeros(32, np.int32),
    }
    scheme = read_scheme({"quantization_config": about})
    assert scheme is not None
    found = eight_bit_weights(scheme, {name: as_lazy(part) for name, part in parts.items()})
    if zero != 128:
        assert not found
        return
    np.testing.assert_array_equal(found["a.weight"].numbers.read(), numbers)
    np.testing.assert_array_equal(found["a.weight"].scale.read(), scales[0].astype(np.float32))
