"""`pytorch_model.bin`: what torch saved is read as torch reads it, and nothing in it is run."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pshare_jax.convert.conversions import import_model
from pshare_jax.convert.orbax import load_weights
from pshare_jax.convert.second_reader import read_folder
from pshare_jax.convert.sources import open_source
from pshare_jax.convert.torch_files import TorchFile
from pshare_jax.errors import CheckpointError
from tests.attack.bounds import cheap
from tests.convert.helpers import (
    hf_tensors,
    model_config,
    random_weights,
    same_bits,
    write_hf_folder,
)
from tests.golden import GOLDEN

SAVED = GOLDEN / "stored" / "torch.bin"
CONFIG = model_config()
WEIGHTS = random_weights(CONFIG)


def test_tensors_are_what_torch_saved():
    found = TorchFile(SAVED).tensors
    expected = load_file(SAVED.with_suffix(".safetensors"))
    assert set(found) == set(expected)
    for name, value in expected.items():
        read = found[name].read()
        assert read.shape == found[name].shape == value.shape
        np.testing.assert_array_equal(read.astype(np.float32), value)
    dtypes = {name: tensor.dtype.name for name, tensor in found.items()}
    assert (dtypes["half"], dtypes["embedding"], dtypes["whole"]) == (
        "float32",
        "bfloat16",
        "int32",
    )


class Storage:
    """What torch's pickles refer to instead of values."""

    def __init__(self, key: str, count: int):
        self.key, self.count = key, count


class Call:
    """Pickles as a call of a name."""

    def __init__(self, module: str, name: str, *arguments):
        self.name = (module, name)
        self.arguments = arguments


class Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes names that need not exist here."""

    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            return ("storage", Call("torch", "FloatStorage"), obj.key, "cpu", obj.count)
        return None

    def save(self, obj, save_persistent_id=True):
        if not isinstance(obj, Call):
            return super().save(obj, save_persistent_id)
        self.write(pickle.GLOBAL + "{}\n{}\n".format(*obj.name).encode())
        if obj.arguments:
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        return None


def write_torch(path: Path, table: object, storages: dict[str, bytes]) -> Path:
    content = io.BytesIO()
    Pickler(content, 2).dump(table)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content.getvalue())
        for key, values in storages.items():
            archive.writestr(f"archive/data/{key}", values)
    return path


def tensor(key: str, shape: tuple[int, ...], offset: int = 0, count: int | None = None) -> Call:
    size = int(np.prod(shape))
    strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    arguments = (Storage(key, size if count is None else count), offset, shape, strides, False, {})
    return Call("torch._utils", "_rebuild_tensor_v2", *arguments)


def write_model(folder: Path, shards: int = 1) -> Path:
    """`CONFIG`'s weights as transformers saved them before safetensors."""
    write_hf_folder(folder, CONFIG, WEIGHTS)
    (folder / "model.safetensors").unlink()
    values = {name: np.ascontiguousarray(v) for name, v in hf_tensors(CONFIG, WEIGHTS).items()}
    weight_map: dict[str, str] = {}
    for i in range(shards):
        part = dict(list(values.items())[i::shards])
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i}.bin"
        table = {n: tensor(str(k), v.shape) for k, (n, v) in enumerate(part.items())}
        storages = {str(k): v.tobytes() for k, v in enumerate(part.values())}
        write_torch(folder / name, table, storages)
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        index = json.dumps({"weight_map": weight_map})
        (folder / "pytorch_model.bin.index.json").write_text(index)
    return folder


@pytest.mark.parametrize("shards", [1, 2])
def test_a_folder_without_safetensors_is_imported(tmp_path, shards):
    folder = write_model(tmp_path / "hf", shards)
    import_model(folder, tmp_path / "base")
    for name, value in load_weights(tmp_path / "base").items():
        assert same_bits(value, WEIGHTS[name]), name
    second = read_folder(folder)
    assert same_bits(second.tensors["embed.embedding"].read(), WEIGHTS["embed.embedding"])


def test_a_folder_that_names_no_class_goes_by_its_model_type(tmp_path):
    folder = write_model(tmp_path / "hf")
    about = json.loads((folder / "config.json").read_text())
    del about["architectures"]
    (folder / "config.json").write_text(json.dumps(about))
    source = open_source(folder)
    assert source.config == CONFIG
    assert source.hf_config is not None
    assert source.hf_config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    "name",
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("numpy", "load"),
        ("torch.os", "x"),
    ],
    ids=".".join,
)
def test_nothing_is_run(tmp_path, name):
    marker = tmp_path / "ran"
    path = write_torch(tmp_path / "a.bin", {"a": Call(*name, f"touch {marker}")}, {})
    with pytest.raises(CheckpointError, match=f"{'.'.join(name)} is nothing that a tensor needs"):
        TorchFile(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"a": tensor("0", (2, 2), offset=1)}, "reaches beyond its storage"),
        ({"a": tensor("0", (1 << 40, 2), count=4)}, "reaches beyond its storage"),
        ({"a": tensor("9", (2, 2))}, "tensor a: its values are not in the file"),
        ({"a": tensor("0", (2, 4))}, "tensor a: its values are not in the file"),
        ({"a": 3}, "'a' is no tensor"),
        ([1], "holds no table of tensors"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, table, words):
    path = write_torch(tmp_path / "a.bin", table, {"0": np.zeros(4, np.float32).tobytes()})
    with pytest.raises(CheckpointError, match=words):
        TorchFile(path)


def test_a_tensor_of_a_few_values_does_not_become_a_large_one(tmp_path):
    """Strides of 0 repeat values: a petabyte of them in a kilobyte."""
    arguments = (Storage("0", 4), 0, (1 << 50,), (0,), False, {})
    table = {"a": Call("torch._utils", "_rebuild_tensor_v2", *arguments)}
    path = write_torch(tmp_path / "a.bin", table, {"0": bytes(16)})
    with pytest.raises(CheckpointError, match="reaches beyond its storage"):
        TorchFile(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\x02Nr\xff\xff\xff\xff.", "numbers more objects than it has bytes"),
        (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".", "no file of tensors"),
        (b"\x80\x02(i os\nsystem\n.", "no file of tensors that torch"),
        (b"I1\n.", "INT is no operation that torch writes"),
        (b"", "no file of tensors that torch"),
    ],
    ids=["memo", "bytearray", "inst", "text", "nothing"],
)
def test_what_torch_does_not_write_is_not_even_read(tmp_path, content, words):
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("archive/data.pkl", content)
    with cheap(), pytest.raises(CheckpointError, match=words):
        TorchFile(tmp_path / "a.bin")


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "a.bin"
    shutil.copy(SAVED, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="no file of tensors that torch"):
        TorchFile(path)
