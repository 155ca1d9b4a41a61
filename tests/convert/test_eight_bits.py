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
from pshare_jax.convert.__main__ import main
from pshare_jax.convert.conversions import export, import_model, make_decoder
from pshare_jax.convert.manifest import MANIFEST_FILE, Manifest
from pshare_jax.convert.orbax import load_weights, open_stored, open_weights, read_manifest
from pshare_jax.convert.tensors import LazyTensor
from pshare_jax.engine.sources import checkpoint_sources
from pshare_jax.errors import CertificateError, CheckpointError
from pshare_jax.models.quantise import in_format, quantise
from pshare_jax.models.weights import weight_specs
from pshare_jax.sharding.mesh import carve_one
from pshare_jax.sharding.rules import weight_shardings
from tests.convert.eight_bits import CONFIG, DTYPES, HEAD, TITLES, WEIGHTS, bytes_of, write_folder
from tests.convert.helpers import hf_tensors, random_weights, write_hf_folder
from tests.convert.test_decoder import factors_for, write_peft


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


def test_an_unknown_form_is_refused(form, base, tmp_path):
    copy = shutil.copytree(base.folder, tmp_path / "copy")
    about = json.loads((copy / MANIFEST_FILE).read_text())
    (copy / MANIFEST_FILE).write_text(json.dumps(about | {"weights": "int3"}))
    with pytest.raises(CheckpointError, match="weights of the form 'int3' are not known"):
        read_manifest(copy)
    (copy / MANIFEST_FILE).write_text(json.dumps({**about, "weights": "plain"}))
    with pytest.raises(CheckpointError, match=f"has an unsupported dtype '{DTYPES[form].name}'"):
        read_manifest(copy)
