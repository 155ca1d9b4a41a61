"""Weights that a source has in 8 bits: kept to the bit, or dequantised."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pshare_jax.config import ModelEntry, ServeConfig
from pshare_jax.convert import hf
from pshare_jax.convert.__main__ import main
from pshare_jax.convert.conversions import export, import_model, make_decoder
from pshare_jax.convert.manifest import MANIFEST_FILE, Manifest
from pshare_jax.convert.orbax import load_weights, open_stored, open_weights, read_manifest
from pshare_jax.convert.quantised import eight_bit_weights
from pshare_jax.convert.schemes import read_scheme
from pshare_jax.convert.tensors import FP8, INT8, LazyTensor, as_lazy
from pshare_jax.engine.sources import checkpoint_sources
from pshare_jax.errors import CertificateError, CheckpointError
from pshare_jax.models.quantise import in_format, quantise
from pshare_jax.models.weights import weight_specs
from pshare_jax.sharding.mesh import carve_one
from pshare_jax.sharding.rules import weight_shardings
from tests.convert.helpers import hf_tensors, model_config, random_weights, write_hf_folder
from tests.convert.test_decoder import factors_for, write_peft
from tests.convert.test_quantised import packed
from tests.golden import GOLDEN

CONFIG = model_config(architecture="qwen2", intermediate_size=96, tie_word_embeddings=False)
"""With biases, and a head of its own."""
WEIGHTS = random_weights(CONFIG, dtype="bfloat16")
HEAD = "lm_head"
SAVED_AS = {"int8": "I8", "int32": "I32", "bfloat16": "BF16", "float32": "F32"}
SAVED_AS |= {"float8_e4m3fn": "F8_E4M3"}
DTYPES = {"int8": INT8, "fp8": FP8}
TITLES = {"int8": "whole numbers of 8 bits", "fp8": "FP8 numbers (e4m3)"}
WRITTEN = {
    "int8": ("int-quantized", {"num_bits": 8}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float"}),
}


def save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header: dict[str, Any] = {}
    offset = 0
    for name, value in tensors.items():
        entry = {"dtype": SAVED_AS[value.dtype.name], "shape": value.shape}
        header[name] = entry | {"data_offsets": [offset, offset := offset + value.nbytes]}
    text = json.dumps(header).encode()
    values = b"".join(np.ascontiguousarray(value).tobytes() for value in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)


def numbers_of(shape: tuple[int, ...], seed: int, form: str = "int8") -> np.ndarray:
    """With both ends of the range; most rows have neither. Of FP8 all bytes, but for NaN's."""
    rng = np.random.default_rng(seed)
    if form == "fp8":
        numbers = (rng.integers(0, 0x7F, shape) | rng.integers(0, 2, shape) << 7).astype(np.uint8)
        return numbers.view(FP8)
    numbers = rng.integers(-90, 91, shape).astype(np.int8)
    numbers[0, 0], numbers[1, 0] = -128, 127
    return numbers


def bytes_of(array: Any) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


def write_folder(
    folder: Path, form: str = "int8", *, head: bool = True, **parts: Any
) -> dict[str, Any]:
    """As LLM Compressor writes W8A8 of channels; returns numbers and scales by module.

    Args:
        folder: to write.
        form: of the numbers.
        head: whether the output head is quantised too.
        parts: more of what each module has.
    """
    about = {
        "quant_method": "compressed-tensors",
        "format": WRITTEN[form][0],
        "config_groups": {"group_0": {"weights": WRITTEN[form][1], "targets": ["Linear"]}},
    }
    write_hf_folder(folder, CONFIG, {}, quantization_config=about)
    stored: dict[str, np.ndarray] = {}
    quantised: dict[str, Any] = {}
    for seed, (name, value) in enumerate(hf_tensors(CONFIG, WEIGHTS).items()):
        module = name.removesuffix(".weight")
        if not (name.endswith("_proj.weight") or (head and module == HEAD)):
            stored[name] = value
            continue
        numbers = numbers_of(value.shape, seed, form)
        scale = np.random.default_rng(seed).uniform(1e-4, 1e-3, (len(value), 1))
        scale = scale.astype(ml_dtypes.bfloat16)
        stored |= {name: numbers, f"{module}.weight_scale": scale}
        stored |= {f"{module}.{part}": make(value.shape) for part, make in parts.items()}
        quantised[module] = numbers, scale
    save(folder / "model.safetensors", stored)
    return quantised


def values_of(tensors: dict[str, LazyTensor]) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in tensors.items()}


@pytest.fixture(scope="module", params=DTYPES)
def form(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def folder(form: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(form)


@pytest.fixture(scope="module")
def quantised(form: str, folder: Path) -> dict[str, Any]:
    return write_folder(folder / "hf", form)


@pytest.fixture(scope="module")
def base(folder: Path, quantised: dict[str, Any]) -> Manifest:
    return import_model(folder / "hf", folder / "base")


@pytest.fixture(scope="module")
def plain(folder: Path, quantised: dict[str, Any]) -> Manifest:
    return import_model(folder / "hf", folder / "plain", dequantise=True)


def test_numbers_and_scales_are_the_sources(form, base, quantised):
    stored = values_of(open_stored(read_manifest(base.folder)))
    assert base.weights == form
    for layer in range(CONFIG.num_layers):
        for part, heads in (("q", CONFIG.num_heads), ("v", CONFIG.num_kv_heads)):
            numbers, scale = quantised[f"model.layers.{layer}.self_attn.{part}_proj"]
            kernel = stored[f"layers.{layer}.attn.{part}.kernel"]
            assert kernel.dtype == DTYPES[form]
            found = bytes_of(kernel).reshape(CONFIG.hidden_size, -1)
            np.testing.assert_array_equal(found, bytes_of(numbers.T))
            own = stored[f"layers.{layer}.attn.{part}.kernel_scale"]
            assert own.dtype == np.float32
            np.testing.assert_array_equal(own, scale.astype(np.float32).reshape(heads, -1))
    numbers, scale = quantised[HEAD]
    np.testing.assert_array_equal(bytes_of(stored["lm_head.kernel"]), bytes_of(numbers.T))
    np.testing.assert_array_equal(stored["lm_head.kernel_scale"], scale.astype(np.float32)[:, 0])
    np.testing.assert_array_equal(stored["embed.embedding"], WEIGHTS["embed.embedding"])
    assert {stored[n].dtype.name for n in ("embed.embedding", "final_norm.scale")} == {"bfloat16"}


def test_the_folder_is_half_as_large_and_says_so(form, base, plain, capsys):
    whole = sum(e.nbytes for e in base.tensors.values() if e.dtype == DTYPES[form].name)
    assert whole == sum(np.prod(e.shape) for n, e in base.tensors.items() if n.endswith(".kernel"))
    dequantised = sum(e.nbytes for n, e in plain.tensors.items() if n.endswith(".kernel"))
    assert dequantised == 4 * whole
    assert main(["inspect", "--check", str(base.folder)]) == 0
    assert f"the source's {TITLES[form]}" in capsys.readouterr().out
    assert main(["inspect", str(plain.folder)]) == 0
    assert "the source's" not in capsys.readouterr().out


def test_it_is_said_what_becomes_of_them(form, folder, quantised, tmp_path, caplog):
    import_model(folder / "hf", tmp_path / "base")
    import_model(folder / "hf", tmp_path / "plain", dequantise=True)
    said = [text for text in caplog.messages if "quantised" in text]
    assert [(f"kept as {TITLES[form]}" in t, "dequantised to" in t) for t in said] == [
        (True, False),
        (False, True),
    ]


def test_what_they_stand_for_is_what_a_dequantised_folder_has(form, folder, base, plain, capsys):
    ours, theirs = open_weights(base.folder), open_weights(plain.folder)
    assert list(ours) == list(theirs) == list(weight_specs(CONFIG))
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.read().astype(np.float32), theirs[name].read())
    loaded = load_weights(base.folder, dtype=jnp.float32)
    for name, value in load_weights(plain.folder).items():
        np.testing.assert_array_equal(loaded[name], value, err_msg=name)
    assert main(["verify", str(base.folder), str(folder / "hf")]) == 0
    assert f"{base.folder}: the source's {TITLES[form]}" in capsys.readouterr().out


@pytest.mark.parametrize("gentle", [False, True])
def test_served_as_they_are(form, base, gentle):
    """Whatever dtype is computed in, gently loaded or not, and on a mesh of two."""
    for weights in ("plain", form):
        config = ServeConfig(str(base.folder), [ModelEntry("base", "identity")], weights=weights)
        source, _ = checkpoint_sources(config, "bfloat16")
        assert source.config == in_format(CONFIG, form)
        assert source.kv_name == f"{base.fingerprint}/{form}"
    mesh = carve_one(jax.devices(), 1, 2)[0]
    shardings = weight_shardings(mesh, weight_specs(source.config))
    stored = values_of(open_stored(base))
    same = load_weights(base, dtype="float32", shardings=shardings, convert=dict, gentle=gentle)
    assert set(same) == set(stored)
    for loaded, dtype in ((source.load(shardings), "bfloat16"), (same, "float32")):
        for name, value in loaded.items():
            plain = "kernel" not in name
            assert value.dtype == (dtype if plain else stored[name].dtype)
            np.testing.assert_array_equal(value, stored[name].astype(value.dtype), err_msg=name)
    assert source.load_plain is not None
    whole = source.load_plain(weight_shardings(mesh, weight_specs(CONFIG)))
    assert {value.dtype.name for value in whole.values()} == {"bfloat16"}
    kernel = open_weights(base)["layers.0.mlp.up.kernel"].read().astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(whole["layers.0.mlp.up.kernel"], kernel)


def test_with_rounded_activations_whole_numbers_are_the_same(form, base):
    """Others are rounded to whole numbers."""
    config = ServeConfig(str(base.folder), [ModelEntry("base", "identity")], weights="int8-dynamic")
    source, _ = checkpoint_sources(config, "float32")
    assert source.config.weight_format == "int8-dynamic"
    loaded = source.load({})
    expected: dict[str, Any] = values_of(open_stored(base))
    if form != "int8":
        values = values_of(open_weights(base))
        expected = quantise(source.config, {n: jnp.asarray(v) for n, v in values.items()})
    assert loaded["layers.0.attn.q.kernel"].dtype == jnp.int8
    assert set(loaded) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(loaded[name], value.astype(loaded[name].dtype))


def test_a_head_that_the_source_left_alone_stays(form, tmp_path):
    write_folder(tmp_path / "hf", form, head=False)
    base = import_model(tmp_path / "hf", tmp_path / "base")
    assert base.weights == read_manifest(tmp_path / "base").weights == f"{form}-layers"
    stored = open_stored(base)
    np.testing.assert_array_equal(stored["lm_head.kernel"].read(), WEIGHTS["lm_head.kernel"])
    assert "lm_head.kernel_scale" not in stored
    models = [ModelEntry("base", "identity")]
    left, _ = checkpoint_sources(ServeConfig(str(base.folder), models), "float32")
    assert left.config.weight_format == f"{form}-layers"
    assert left.kv_name == f"{base.fingerprint}/{form}-layers"
    asked, _ = checkpoint_sources(ServeConfig(str(base.folder), models, weights=form), "float32")
    loaded = asked.load({})
    head = {"lm_head.kernel": jnp.asarray(WEIGHTS["lm_head.kernel"], jnp.float32)}
    expected = quantise(in_format(CONFIG, form), head)
    for name, value in expected.items():
        np.testing.assert_array_equal(loaded[name], value)
    name = "layers.1.mlp.down.kernel"
    np.testing.assert_array_equal(loaded[name], stored[name].read())


def test_a_module_belongs_to_one_of_the_two(form, folder, base, plain):
    """The values are the same, the KV is not: a module of the one is not served by the other."""
    assert base.fingerprint != plain.fingerprint
    ours = make_decoder(base.folder, folder / "copy")
    theirs = make_decoder(plain.folder, folder / "other copy")
    assert (ours.weights, ours.fingerprint) == (form, base.fingerprint)
    for manifest, module in ((base, theirs), (plain, ours)):
        config = ServeConfig(str(manifest.folder), [ModelEntry("module", str(module.folder))])
        with pytest.raises(CertificateError, match="module: made for the base"):
            checkpoint_sources(config, "float32")
    config = ServeConfig(str(base.folder), [ModelEntry("module", str(ours.folder))])
    copied = checkpoint_sources(config, "float32")[1][0].load({})
    for name, tensor in open_stored(base).items():
        np.testing.assert_array_equal(copied[name], tensor.read().astype(copied[name].dtype))


def test_fine_tunes_of_such_a_base(form, base, tmp_path):
    """They are plain ones, in the base's dtype, what an adapter is merged with too."""
    write_hf_folder(tmp_path / "tuned", CONFIG, random_weights(CONFIG, seed=5))
    full = make_decoder(base.folder, tmp_path / "full", fine_tune=tmp_path / "tuned")
    assert (full.weights, full.dtype) == ("plain", "bfloat16")
    config = ServeConfig(str(base.folder), [ModelEntry("full", str(full.folder), "isolated")])
    loaded = checkpoint_sources(config, "float32")[1][0].load({})
    rounded = {n: v.astype(ml_dtypes.bfloat16) for n, v in random_weights(CONFIG, seed=5).items()}
    expected = quantise(
        in_format(CONFIG, form), {n: jnp.asarray(v, jnp.float32) for n, v in rounded.items()}
    )
    for name, value in expected.items():
        np.testing.assert_array_equal(loaded[name], value)
    factors = factors_for("q")
    peft = write_peft(tmp_path / "peft", factors, modules_to_save=["norm"])
    norm = {"base_model.model.model.norm.weight": np.full(CONFIG.hidden_size, 3.0, np.float32)}
    path = peft / "adapter_model.safetensors"
    save_file({**load_file(path), **norm}, path)
    merged = make_decoder(base.folder, tmp_path / "merged", lora=peft)
    assert (merged.weights, merged.dtype) == ("plain", "bfloat16")
    found, values = open_weights(merged), open_weights(base)
    a, b = (factors[f"layers.1.attn.q.lora_{x}"] for x in "ab")
    kernel = values["layers.1.attn.q.kernel"].read() + 2 * np.tensordot(a, b, 1)
    np.testing.assert_allclose(
        found["layers.1.attn.q.kernel"].read().astype(np.float32), kernel, rtol=1e-2, atol=1e-3
    )
    kept = values["layers.1.attn.k.kernel"].read().astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found["layers.1.attn.k.kernel"].read(), kept)


def test_an_export_has_what_they_stand_for(base, tmp_path):
    export(base.folder, tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    values = {name: tensor.read().astype(np.float32) for name, tensor in open_weights(base).items()}
    for name, value in hf_tensors(CONFIG, values).items():
        np.testing.assert_array_equal(exported[name], value)
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in about
    assert about.get("dtype", "float32") == "float32"  # which it is where nothing is said


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
    save(path, tensors)
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
    path = GOLDEN / "stored" / "compressed.safetensors"
    names = [name for name in hf.files_in(path.parent, path.name) if name.startswith(f"{scheme}/")]
    parts = {"x." + name.partition("/")[2]: hf.lazy_tensor(path, name, raw=True) for name in names}
    expected = parts.pop("x.expected").read()
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
    save(path, tensors)
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


def test_an_unknown_form_is_refused(form, base, tmp_path):
    copy = shutil.copytree(base.folder, tmp_path / "copy")
    about = json.loads((copy / MANIFEST_FILE).read_text())
    (copy / MANIFEST_FILE).write_text(json.dumps(about | {"weights": "int3"}))
    with pytest.raises(CheckpointError, match="weights of the form 'int3' are not known"):
        read_manifest(copy)
    (copy / MANIFEST_FILE).write_text(json.dumps({**about, "weights": "plain"}))
    with pytest.raises(CheckpointError, match=f"has an unsupported dtype '{DTYPES[form].name}'"):
        read_manifest(copy)
