"""Checkpoint folders: round trips, sharded loads, and every way a write or read can fail."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from pshare_jax.convert import orbax
from pshare_jax.convert.inspection import check_hashes
from pshare_jax.convert.manifest import read_manifest
from pshare_jax.convert.orbax import (
    load_weights,
    open_weights,
    write_decode,
    write_prefill,
)
from pshare_jax.convert.tensors import LazyTensor
from pshare_jax.convert.zarr import StoredTensor, chunk_shape
from pshare_jax.core.split_rule import LastTokens
from pshare_jax.errors import CheckpointError
from pshare_jax.models.weights import WeightSpec, lora_specs, weight_specs
from pshare_jax.sharding.rules import weight_shardings
from tests.convert.helpers import (
    TOKENIZER_FILES,
    model_config,
    random_tensors,
    random_weights,
    same_bits,
)

CONFIG = model_config()
WEIGHTS = random_weights(CONFIG)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A prefill checkpoint that no test changes."""
    folder = tmp_path_factory.mktemp("saved") / "base"
    write_prefill(folder, CONFIG, WEIGHTS, TOKENIZER_FILES, source_config={"model_type": "llama"})
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_come_back_bit_for_bit(tmp_path, dtype):
    weights = random_weights(CONFIG, dtype=dtype)
    manifest = write_prefill(tmp_path / "base", CONFIG, weights, TOKENIZER_FILES)
    loaded = load_weights(tmp_path / "base")
    lazy = open_weights(tmp_path / "base")
    assert list(loaded) == list(lazy) == list(weight_specs(CONFIG))
    for name, weight in weights.items():
        assert isinstance(loaded[name], jax.Array)
        assert same_bits(loaded[name], weight), name
        assert same_bits(lazy[name].read(), weight), name
    assert manifest.dtype == dtype
    assert manifest.nbytes == sum(weight.nbytes for weight in weights.values())


def test_the_manifest_comes_back(saved):
    manifest = read_manifest(saved)
    assert manifest.config == CONFIG
    assert manifest.kind == "prefill"
    assert manifest.certificate is None
    assert manifest.source_config == {"model_type": "llama"}
    assert list(manifest.tensors) == list(weight_specs(CONFIG))
    assert orbax.read_tokenizer_files(manifest) == TOKENIZER_FILES


def test_zeros_are_stored(tmp_path):
    """All-zero chunks are Zarr's fill value; a fresh LoRA's B factors are nothing else."""
    weights = {name: np.zeros_like(weight) for name, weight in WEIGHTS.items()}
    write_prefill(tmp_path / "base", CONFIG, weights, TOKENIZER_FILES)
    loaded = load_weights(tmp_path / "base")
    assert all(same_bits(loaded[name], weight) for name, weight in weights.items())
    check_hashes(tmp_path / "base")


def test_stock_orbax_restores_the_weights(saved):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    target = {
        name: jax.ShapeDtypeStruct(
            weight.shape,
            weight.dtype,
            sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
        )
        for name, weight in WEIGHTS.items()
    }
    restored = ocp.StandardCheckpointer().restore(saved / "weights", target)
    assert all(same_bits(restored[name], weight) for name, weight in WEIGHTS.items())


def test_dtype_is_cast_while_reading(saved):
    loaded = load_weights(saved, dtype=jnp.bfloat16)
    for name, weight in WEIGHTS.items():
        assert same_bits(loaded[name], weight.astype(ml_dtypes.bfloat16)), name


def test_groups_of_tensors_give_the_same_weights(saved, monkeypatch):
    monkeypatch.setattr(orbax, "GROUP_BYTES", 1 << 14)
    loaded = load_weights(saved)
    assert list(loaded) == list(WEIGHTS)
    assert all(same_bits(loaded[name], weight) for name, weight in WEIGHTS.items())


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((49152, 576), ("vocab", "embed"), (3072, 576)),
        ((576, 9, 64), ("embed", "heads", "head_dim"), (576, 1, 64)),
        ((576, 40, 64), ("embed", "heads", "head_dim"), (576, 4, 64)),
        ((1536, 576), ("mlp", "embed"), (96, 576)),
        ((576, 17), ("embed", "mlp"), (576, 17)),
        ((576,), (None,), (576,)),
    ],
)
def test_chunks_lie_along_the_sharded_axis(shape, axes, expected):
    assert chunk_shape(WeightSpec(shape, axes)) == expected


def bytes_read() -> int:
    """Bytes that this process has asked the system for."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def test_sharded_load_reads_each_byte_once(tmp_path):
    """On 8 devices every device reads its shard: all of them together read the file once."""
    config = model_config(
        num_heads=8, num_kv_heads=8, head_dim=32, hidden_size=256, intermediate_size=512
    )
    weights = random_weights(config)
    manifest = write_prefill(tmp_path / "base", config, weights, TOKENIZER_FILES)
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = weight_shardings(mesh, manifest.specs)
    before = bytes_read()
    loaded = load_weights(manifest, shardings=shardings)
    jax.block_until_ready(loaded)
    read = bytes_read() - before
    for name, weight in weights.items():
        assert loaded[name].sharding == shardings[name]
        assert same_bits(loaded[name], weight), name
    shard = loaded["layers.0.mlp.gate.kernel"].addressable_shards[3]
    assert same_bits(shard.data, weights["layers.0.mlp.gate.kernel"][:, 192:256])
    sharded = [name for name, s in shardings.items() if not s.is_fully_replicated]
    assert sum(weights[name].nbytes for name in sharded) > 0.99 * manifest.nbytes
    # Beyond the values: chunk tables, Zarr headers, and norms that each device reads.
    assert manifest.nbytes <= read < 1.15 * manifest.nbytes
    for name, spec in manifest.specs.items():
        shard = shardings[name].shard_shape(spec.shape)
        chunk = chunk_shape(spec)
        assert all(size % part == 0 for size, part in zip(shard, chunk, strict=True)), name


def test_a_shard_is_read_without_the_rest_of_its_tensor(tmp_path):
    """One device of a mesh needs one chunk of a tensor and reads little more."""
    config = model_config(intermediate_size=4096, hidden_size=256, head_dim=16)
    weights = random_weights(config)
    write_prefill(tmp_path / "base", config, weights, TOKENIZER_FILES)
    name = "layers.1.mlp.down.kernel"
    stored = StoredTensor(tmp_path / "base" / "weights", name)
    before = bytes_read()
    part = stored.read((slice(512, 1024), slice(None)))()
    read = bytes_read() - before
    assert same_bits(part, weights[name][512:1024])
    assert part.nbytes <= read < part.nbytes + 20_000 < weights[name].nbytes / 4


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """A LazyTensor is read when its turn comes, once, and not held on to."""
    import weakref

    alive: list[weakref.ref] = []
    most = 0

    def lazy(weight):
        def read():
            nonlocal most
            array = weight.copy()
            alive.append(weakref.ref(array))
            most = max(most, sum(ref() is not None for ref in alive))
            return array

        return LazyTensor(weight.shape, weight.dtype, read)

    write_prefill(
        tmp_path / "base", CONFIG, {k: lazy(v) for k, v in WEIGHTS.items()}, TOKENIZER_FILES
    )
    assert len(alive) == len(WEIGHTS)
    assert most <= 2


def test_report_is_called_for_each_tensor(tmp_path):
    seen = {}
    write_prefill(tmp_path / "base", CONFIG, WEIGHTS, TOKENIZER_FILES, report=seen.__setitem__)
    assert seen == {name: weight.nbytes for name, weight in WEIGHTS.items()}


# Fingerprints and certificates


def test_fingerprint_names_weights_and_tokenizer(saved, tmp_path):
    base = read_manifest(saved).fingerprint
    same = write_prefill(
        tmp_path / "same",
        CONFIG,
        dict(reversed(WEIGHTS.items())),
        {**TOKENIZER_FILES, "tokenizer_config.json": b"{ }"},
    )
    assert same.fingerprint == base
    changed = dict(WEIGHTS)
    changed["final_norm.scale"] = np.nextafter(WEIGHTS["final_norm.scale"], np.float32(9))
    other = write_prefill(tmp_path / "weights", CONFIG, changed, TOKENIZER_FILES)
    assert other.fingerprint != base
    tokenizer = {**TOKENIZER_FILES, "tokenizer.json": b"{ }"}
    assert write_prefill(tmp_path / "tok", CONFIG, WEIGHTS, tokenizer).fingerprint != base


def test_a_copy_of_the_base_has_the_base_fingerprint(saved, tmp_path):
    base = read_manifest(saved)
    write_decode(tmp_path / "copy", base, open_weights(base), cache_conditioned=True, tail=3)
    manifest = read_manifest(tmp_path / "copy")
    assert manifest.certificate is not None
    assert manifest.certificate.prefill_fingerprint == base.fingerprint
    assert manifest.certificate.weights_fingerprint == manifest.fingerprint == base.fingerprint
    assert manifest.certificate.tail == LastTokens(3)
    assert not (tmp_path / "copy" / "tokenizer").exists()


def test_lora_fingerprint_covers_alpha(saved, tmp_path):
    base = read_manifest(saved)
    factors = random_tensors(lora_specs(CONFIG, 4, ("q", "down")))
    fingerprints = set()
    for alpha in (8.0, 16.0):
        manifest = write_decode(
            tmp_path / f"lora{alpha}",
            base,
            factors,
            cache_conditioned=False,
            lora_rank=4,
            lora_alpha=alpha,
            lora_targets=("q", "down"),
        )
        loaded = load_weights(tmp_path / f"lora{alpha}")
        assert all(same_bits(loaded[name], factor) for name, factor in factors.items())
        assert check_hashes(tmp_path / f"lora{alpha}").fingerprint == manifest.fingerprint
        fingerprints.add(manifest.fingerprint)
    assert len(fingerprints) == 2


def test_a_decode_module_is_no_base(saved, tmp_path):
    module = write_decode(tmp_path / "a", read_manifest(saved), WEIGHTS, cache_conditioned=True)
    with pytest.raises(CheckpointError, match="is a decode checkpoint, not a prefill one"):
        write_decode(tmp_path / "b", module, WEIGHTS, cache_conditioned=True)
    assert not (tmp_path / "b").exists()


# Failing writes leave nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final_norm.scale": None}, "tensor final_norm.scale is missing"),
        ({"extra": np.zeros(3, np.float32)}, "tensor extra is unexpected"),
        ({"final_norm.scale": np.zeros(3, np.float32)}, "final_norm.scale has shape .3., needs"),
        ({"final_norm.scale": np.zeros(48, np.float16)}, "dtype float16, float32: need one of"),
    ],
)
def test_tensors_are_checked_before_anything_is_written(tmp_path, change, message):
    tensors = {k: v for k, v in {**WEIGHTS, **change}.items() if v is not None}
    with pytest.raises(CheckpointError, match=message):
        write_prefill(tmp_path / "base", CONFIG, tensors, TOKENIZER_FILES)
    assert list(tmp_path.iterdir()) == []


def failing(error: BaseException) -> LazyTensor:
    def read():
        raise error

    return LazyTensor((48,), np.dtype(np.float32), read)


@pytest.mark.parametrize(
    "error", [CheckpointError("x.safetensors: tensor t: truncated"), KeyboardInterrupt()]
)
def test_a_failing_read_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)) as raised:
        write_prefill(
            tmp_path / "base",
            CONFIG,
            {**WEIGHTS, "final_norm.scale": failing(error)},
            TOKENIZER_FILES,
        )
    assert str(raised.value) == str(error)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path):
    wrong = LazyTensor((48,), np.dtype(np.float32), lambda: np.zeros(47, np.float32))
    with pytest.raises(CheckpointError, match=r"final_norm.scale: read as float32\[47\], announ"):
        write_prefill(
            tmp_path / "base", CONFIG, {**WEIGHTS, "final_norm.scale": wrong}, TOKENIZER_FILES
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
def test_an_existing_destination_is_not_touched(tmp_path, kind):
    dest = tmp_path / "base"
    match kind:
        case "folder":
            dest.mkdir()
            (dest / "mine").write_text("keep")
        case "empty folder":
            dest.mkdir()
        case "file":
            dest.write_text("keep")
        case _:
            dest.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="exists already"):
        write_prefill(dest, CONFIG, WEIGHTS, TOKENIZER_FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"no disk space: .* MB are needed, 0 MB are free"):
        write_prefill(tmp_path / "base", CONFIG, WEIGHTS, TOKENIZER_FILES)
    assert list(tmp_path.iterdir()) == []
