"""Quantised Hugging Face folders: what is read is what was stored, or it is refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pshare_jax.convert import hf, names
from pshare_jax.convert.conversions import export, import_model
from pshare_jax.convert.quantised import eight_bit_weights, plain_tensors
from pshare_jax.convert.schemes import FP4_VALUES, read_scheme
from pshare_jax.convert.second_reader import read_folder
from pshare_jax.convert.sources import open_source
from pshare_jax.convert.tensors import as_lazy
from pshare_jax.errors import CheckpointError
from pshare_jax.models.config import with_layers
from pshare_jax.models.rope import Rope, YarnRopeScaling
from tests.convert.eight_bits import written_by_compressed_tensors
from tests.convert.helpers import (
    gguf_config,
    hf_tensors,
    model_config,
    random_weights,
    same_bits,
    save_safetensors,
    write_hf_folder,
)

CONFIG = gguf_config()
"""Its rows come in whole groups of 32."""
WEIGHTS = random_weights(CONFIG)
GROUP = 16


def packed(numbers: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Unsigned numbers in words of 32 bits, the first in the lowest bits."""
    moved = np.moveaxis(numbers.astype(np.uint32), axis, -1)
    words = moved.reshape(*moved.shape[:-1], -1, 32 // bits)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    joined = np.bitwise_or.reduce(words << shifts, axis=-1)
    return np.ascontiguousarray(np.moveaxis(joined, -1, axis)).view(np.int32)


def whole_numbers(shape: tuple[int, int], bits: int, seed: int) -> tuple[np.ndarray, ...]:
    """Numbers `[in, out]`, zeros and scales of groups of inputs."""
    rng = np.random.default_rng(seed)
    groups = (shape[0] // GROUP, shape[1])
    numbers = rng.integers(0, 1 << bits, shape)
    zeros = rng.integers(1, 1 << bits, groups)
    return numbers, zeros, (0.01 * rng.uniform(0.5, 1, groups)).astype(np.float16)


def gptq(weight: np.ndarray, seed: int, **about: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The parts of a weight `[out, in]`'s shape, its groups in disorder, and the weight."""
    bits = about["bits"]
    numbers, zeros, scales = whole_numbers(weight.shape[::-1], bits, seed)
    group = np.random.default_rng(seed).permutation(len(numbers)) // GROUP
    offset = 0 if about.get("checkpoint_format") == "gptq_v2" else 1
    parts = {
        "qweight": packed(numbers, bits, 0),
        "qzeros": packed(zeros - offset, bits, 1),
        "scales": scales,
        "g_idx": group.astype(np.int32),
    }
    return parts, ((numbers - zeros[group]) * scales[group].astype(np.float32)).T


def awq(weight: np.ndarray, seed: int, **about: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The same; nibble i of a word holds the column of this number."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    numbers, zeros, scales = whole_numbers(weight.shape[::-1], 4, seed)
    group = np.arange(len(numbers)) // GROUP

    def words(values: np.ndarray) -> np.ndarray:
        return packed(values.reshape(len(values), -1, 8)[..., order].reshape(len(values), -1), 4, 1)

    parts = {"qweight": words(numbers), "qzeros": words(zeros), "scales": scales}
    return parts, ((numbers - zeros[group]) * scales[group].astype(np.float32)).T


def fp8(weight: np.ndarray, seed: int, **about: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Blocks of 48 by 32, which do not all divide a weight's rows."""
    values = np.random.default_rng(seed).standard_normal(weight.shape)
    values = values.astype(ml_dtypes.float8_e4m3fn)
    rows, columns = (-(-n // size) for n, size in zip(weight.shape, (48, 32), strict=True))
    scales = np.random.default_rng(seed).uniform(0.01, 0.02, (rows, columns)).astype(np.float32)
    wide = np.kron(scales, np.ones((48, 32)))[: weight.shape[0], : weight.shape[1]]
    parts = {"weight": values, "weight_scale_inv": scales, "input_scale": np.ones(1, np.float32)}
    return parts, (values.astype(np.float32) * wide).astype(np.float32)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4}),
    "gptq of 8 bits": (gptq, {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [48, 32]}),
}


def write_quantised(folder: Path, case: str) -> dict[str, np.ndarray]:
    """A folder with quantised projections; returns the tensors that these stand for."""
    make, about = CASES[case]
    write_hf_folder(folder, CONFIG, WEIGHTS, quantization_config=about)
    stored: dict[str, np.ndarray] = {}
    plain: dict[str, np.ndarray] = {}
    for seed, (name, value) in enumerate(hf_tensors(CONFIG, WEIGHTS).items()):
        plain[name] = value
        if not name.endswith("_proj.weight"):
            stored[name] = value
            continue
        module = name.removesuffix(".weight")
        parts, plain[name] = make(value, seed, **about)
        stored |= {f"{module}.{part}": array for part, array in parts.items()}
    save_safetensors(folder / "model.safetensors", stored)
    return plain


@pytest.mark.parametrize("case", CASES)
def test_a_quantised_folder_is_what_it_stands_for(tmp_path, caplog, case):
    expected = write_quantised(tmp_path / "hf", case)
    import_model(tmp_path / "hf", tmp_path / "base")
    (line,) = (text for text in caplog.messages if "quantised" in text)
    assert "they are dequantised to float32, and activations are not rounded" in line
    export(tmp_path / "base", tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert set(exported) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(exported[name], value, rtol=1e-6, err_msg=name)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    second = read_folder(tmp_path / "hf")
    first = open_source(tmp_path / "hf")
    for name, tensor in first.tensors.items():
        np.testing.assert_array_equal(second.tensors[name].read(), tensor.read())


@pytest.mark.parametrize("scheme", ["w4", "w4-zeros", "w8-channel", "int8", "fp8", "fp8-tensor"])
def test_compressed_tensors_are_read_as_their_library_does(scheme):
    form = {"i": "int-quantized", "f": "float-quantized", "w": "pack-quantized"}[scheme[0]]
    weights = {"num_bits": 4 if "4" in scheme else 8}
    about = {"quant_method": "compressed-tensors", "format": form}
    about["config_groups"] = {"group_0": {"weights": weights, "targets": ["Linear"]}}
    parts, expected = written_by_compressed_tensors(scheme)
    found = read_scheme({"quantization_config": about})
    assert found is not None
    (tensor,) = plain_tensors(found, parts).values()
    assert tensor.shape == expected.shape
    np.testing.assert_allclose(tensor.read(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stated", [True, False])
def test_blocks_that_do_not_divide_a_weight_are_those_that_are_stated(stated):
    """Of 250 rows the second block of 128 has 122; where none is stated, nothing is guessed."""
    weights = {"num_bits": 8, "type": "float"} | (
        {"strategy": "block", "block_structure": [128, 32]} if stated else {}
    )
    about = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    about["config_groups"] = {"group_0": {"weights": weights, "targets": ["Linear"]}}
    scheme = read_scheme({"quantization_config": about})
    assert scheme is not None
    ones = np.ones((250, 80), ml_dtypes.float8_e4m3fn)
    scales = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = plain_tensors(scheme, {"a.weight": as_lazy(ones), "a.weight_scale": as_lazy(scales)})
    if not stated:
        words = r"a.weight: its parts do not fit together: scales of shape \[2, 3\] for \[250, 80\]"
        with pytest.raises(CheckpointError, match=words):
            found["a.weight"].read()
        return
    expected = scales.repeat(128, 0).repeat(32, 1)[:250, :80]
    np.testing.assert_array_equal(found["a.weight"].read(), expected)


@pytest.mark.parametrize(
    ("method", "shape", "rows", "columns"),
    [
        ("fp8", (256, 1), 1, 256),
        ("fp8", (256,), 1, 256),
        ("compressed-tensors", (256, 4), 1, 64),
        ("fp8", (2, 2), 128, 128),  # as transformers has it unless another size is stated
        ("compressed-tensors", (2, 2), None, None),
        ("fp8", (1, 256), None, None),
        ("compressed-tensors", (1, 256), None, None),
        ("fp8", (64,), None, None),
    ],
)
def test_scales_whose_blocks_are_not_stated(method, shape, rows, columns):
    about: dict[str, Any] = {"quant_method": method, "format": "float-quantized"}
    about["config_groups"] = {"group_0": {"weights": {"num_bits": 8}, "targets": ["Linear"]}}
    scheme = read_scheme({"quantization_config": about})
    assert scheme is not None
    ones = np.ones((256, 256), ml_dtypes.float8_e4m3fn)
    scales = np.arange(1, 1 + math.prod(shape), dtype=np.float32).reshape(shape)
    parts = {"a.weight": as_lazy(ones), "a.weight_scale": as_lazy(scales)}
    found = plain_tensors(scheme, parts)["a.weight"]
    if rows is None:
        said = rf"a.weight: .* scales of shape \[{shape[0]}.* are neither one, nor some for each"
        with pytest.raises(CheckpointError, match=said):
            found.read()
        assert not eight_bit_weights(scheme, parts)
    else:
        expected = np.kron(scales.reshape(shape[0], -1), np.ones((rows, columns)))
        np.testing.assert_array_equal(found.read(), expected)


def test_mxfp4_are_nibbles_times_powers_of_two():
    scheme = read_scheme({"quantization_config": {"quant_method": "mxfp4"}})
    assert scheme is not None
    blocks = np.arange(2 * 3 * 2 * 16, dtype=np.uint8).reshape(2, 3, 2, 16)
    scales = np.arange(120, 132, dtype=np.uint8).reshape(2, 3, 2)
    found = plain_tensors(scheme, {"a_blocks": as_lazy(blocks), "a_scales": as_lazy(scales)})
    value = found["a"].read()
    assert value.shape == found["a"].shape == (2, 64, 3)
    power = 2.0 ** (int(scales[1, 2, 1]) - 127)
    assert value[1, 32, 2] == FP4_VALUES[blocks[1, 2, 1, 0] & 15] * power
    assert value[1, 33, 2] == FP4_VALUES[blocks[1, 2, 1, 0] >> 4] * power
    assert list(FP4_VALUES[[1, 7, 9, 15]]) == [0.5, 6.0, -0.5, -6.0]


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'; supported are gptq"),
        ({"bits": 4}, "quant_method is None"),
        ("int4", "quantization_config is 'int4', but must be an object"),
        ({"quant_method": "gptq", "bits": 3}, "bits is 3; supported are 2, 4, 8"),
        ({"quant_method": "gptq"}, "bits is missing"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format"),
        ({"quant_method": "awq", "bits": 8}, "bits is 8; supported is 4"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version is 'gemv'"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "weight_block_size"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    name: {"weights": {"num_bits": 8, "block_structure": [size, size]}}
                    for name, size in (("a", 64), ("b", 128))
                },
            },
            "config_groups has blocks of several sizes",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24"},
            "format is 'marlin-24'; supported are float-quantized",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"a": {"weights": {"num_bits": 3}}},
            },
            r"weights of \[3\] bits",
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}},
            "sparsity_config",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_not_supported_is_named(tmp_path, about, words):
    folder = write_hf_folder(tmp_path / "hf", CONFIG, WEIGHTS, quantization_config=about)
    with pytest.raises(CheckpointError, match=words):
        open_source(folder)


def rewrite(path: Path, change) -> None:
    tensors = {name: hf.lazy_tensor(path, name, raw=True).read() for name in load_names(path)}
    change(tensors)
    save_safetensors(path, tensors)


def load_names(path: Path) -> list[str]:
    return list(hf.files_in(path.parent, path.name))


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{Q}.qweight"), rf"tensors {Q}\.\*: g_idx, qzeros, scales are no weight"),
        (lambda t: t.pop(f"{Q}.scales"), f"{Q}.weight: its parts do not fit together: 'scales'"),
        (
            lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:0]}) or t.pop(f"{Q}.g_idx"),
            f"{Q}.weight: its parts do not fit together",
        ),
        (lambda t: t[f"{Q}.g_idx"].fill(99), f"{Q}.weight: its parts do not fit together"),
        (lambda t: t[f"{Q}.g_idx"].fill(-1), "g_idx gives no group for each input"),
        (
            lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:-1]}),
            rf"{Q}\.weight has shape \[64, 56\], but config.json needs \[64, 64\]",
        ),
    ],
)
def test_a_damaged_weight_is_named(tmp_path, change, words):
    write_quantised(tmp_path / "hf", "gptq")
    rewrite(tmp_path / "hf" / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=words):
        import_model(tmp_path / "hf", tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_module_that_was_left_alone_stays_as_it_is(tmp_path):
    write_quantised(tmp_path / "hf", "fp8")
    name = f"{Q}.weight"
    plain = hf_tensors(CONFIG, WEIGHTS)[name]

    def change(tensors):
        del tensors[f"{Q}.weight_scale_inv"], tensors[f"{Q}.input_scale"]
        tensors[name] = plain

    rewrite(tmp_path / "hf" / "model.safetensors", change)
    found = open_source(tmp_path / "hf").tensors["layers.1.attn.q.kernel"].read()
    assert same_bits(found, WEIGHTS["layers.1.attn.q.kernel"])


def test_without_a_quantization_config_whole_numbers_are_refused(tmp_path):
    folder = write_hf_folder(tmp_path / "hf", CONFIG, WEIGHTS)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.weight"] = np.zeros((64, 64), np.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor {Q}.weight has dtype I8; supported are"):
        open_source(folder)


def test_gpt_oss_with_experts_in_mxfp4(tmp_path):
    config = model_config(architecture="gpt_oss", hidden_size=64, rope_scaling=None)
    yarn = YarnRopeScaling(4.0, 64, 1.1, truncate=False)
    layers = [replace(spec, rope=Rope(1e4, yarn)) for spec in config.layer_specs]
    config = with_layers(config, layers)
    weights = random_weights(config)
    about = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}
    folder = write_hf_folder(tmp_path / "hf", config, {}, quantization_config=about)
    stored: dict[str, np.ndarray] = {}
    plain: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(0)
    for name in names.hf_tensors(config):
        value = np.ascontiguousarray(names.write_hf(name, config, weights.__getitem__))
        plain[name] = value
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = value
            continue
        experts, inputs, out = value.shape
        blocks = rng.integers(0, 256, (experts, out, inputs // 32, 16), np.uint8)
        scales = rng.integers(120, 125, (experts, out, inputs // 32)).astype(np.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        nibbles = np.stack([blocks & 15, blocks >> 4], -1).reshape(experts, out, -1, 32)
        wide = FP4_VALUES[nibbles] * 2.0 ** (scales[..., None].astype(int) - 127)
        plain[name] = wide.reshape(experts, out, inputs).swapaxes(1, 2).astype(np.float32)
    save_file(stored, folder / "model.safetensors")
    source = open_source(folder)
    assert source.config == config
    for native, tensor in source.tensors.items():
        expected = names.read_native(native, config, plain.__getitem__)
        np.testing.assert_array_equal(tensor.read(), expected, err_msg=native)
