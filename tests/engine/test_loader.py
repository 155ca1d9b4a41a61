"""What the loader puts onto meshes, how often it reads that, and how often it is in memory."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from pshare_jax.config import DecodeConfig, PrefillConfig
from pshare_jax.engine import orchestrator
from pshare_jax.engine.loader import WeightLoader
from pshare_jax.engine.sources import BASE, model_specs
from pshare_jax.engine.weight_format import LoadTensors
from pshare_jax.models.weights import LORA_TARGETS, Weights, alias_on, same_memory
from pshare_jax.sharding.mesh import carve
from tests.engine.harness import Models, lora_module, running, serve_config
from tests.helpers import tiny_config

BACKENDS = ("cpu_ffi", "xla")


def models(**overrides: Any) -> Models:
    """The base, two LoRA modules, a full one, and one of each kind that is isolated."""
    config = tiny_config(**overrides)
    made = Models(config)
    made.add_identity("plain")
    made.add_lora("lora", lora_module(config, 3, rank=2, targets=("q", "v")))
    made.add_lora("other-lora", lora_module(config, 4, rank=4, targets=LORA_TARGETS))
    made.add_full("full", 1)
    # Named as the loader names the base's weights.
    made.add_full(BASE, 5, isolated=True)
    made.add_identity("isolated", isolated=True)
    made.add_lora(
        "isolated-lora", lora_module(config, 6, rank=3, targets=("k", "up")), isolated=True
    )
    return made


class Loads:
    """A loader over sources that count how often each checkpoint is read."""

    def __init__(self, models: Models, backend: str, engines: int = 1):
        self.counts: Counter[str] = Counter()
        base = replace(models.base_source, load=self._counting("the base", models.base))
        sources = [
            replace(s, load=base.load if s.kind == "identity" else self._wrap(s.name, s.load))
            for s in models.sources
        ]
        self.table = model_specs(base, sources, engines)
        self.loader = WeightLoader(base, sources, backend)

    def _counting(self, name: str, weights: Weights) -> LoadTensors:
        return self._wrap(
            name, lambda to: {n: jax.device_put(a, to[n]) for n, a in weights.items()}
        )

    def _wrap(self, name: str, load: LoadTensors) -> LoadTensors:
        def counted(shardings: Mapping[str, Any]) -> Weights:
            self.counts[name] += 1
            return load(shardings)

        return counted


def pointers(tree: Any) -> list[int]:
    """Where the parts of all arrays are in memory, in order."""
    return [
        shard.data.unsafe_buffer_pointer()
        for array in jax.tree.leaves(tree)
        for shard in array.addressable_shards
    ]


def devices(tree: Any) -> set[Any]:
    return {d for array in jax.tree.leaves(tree) for d in array.sharding.device_set}


def meshes(prefill: int, decode: int, degree: int = 1) -> tuple[list[Mesh], list[Mesh]]:
    return carve(jax.devices(), prefill, degree, decode, degree)


@pytest.mark.parametrize("backend", BACKENDS)
def test_meshes_of_a_cpu_have_the_same_memory(backend: str) -> None:
    loads = Loads(models(), backend, engines=2)
    prefill_meshes, decode_meshes = meshes(2, 2)
    decoders = [loads.loader.decode(m, i, loads.table) for i, m in enumerate(decode_meshes)]
    prefills = [loads.loader.prefill(m) for m in prefill_meshes]

    base, full = decoders[0][BASE], decoders[0]["full/full"]
    own = decoders[0][loads.table[BASE].group]
    for mesh, weights in zip(prefill_meshes, prefills, strict=True):
        assert pointers(weights[BASE]) == pointers(base.weights)
        assert pointers(weights[loads.table[BASE].prefill_weights]) == pointers(own.weights)
        assert devices(weights) == {mesh.devices.item()}
    for mesh, groups in zip(decode_meshes, decoders, strict=True):
        assert pointers(groups[BASE].weights) == pointers(base.weights)
        assert pointers(groups[BASE].adapters) == pointers(base.adapters)
        assert pointers(groups["full/full"].weights) == pointers(full.weights)
        held = [(group.weights, group.adapters) for group in groups.values()]
        assert devices(held) == {mesh.devices.item()}
    # The base, two full modules, the adapters, and what is merged for the isolated LoRA module: of
    # unpacked weights only the four kernels that it adapts.
    num = len(pointers(base.weights))
    once = 3 * num + len(pointers(base.adapters)) + (num if backend == "cpu_ffi" else 4)
    held = [prefills, *[(g.weights, g.adapters) for d in decoders for g in d.values()]]
    assert len(set(pointers(held))) == once


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_is_read_once(backend: str) -> None:
    loads = Loads(models(), backend, engines=2)
    prefill_meshes, decode_meshes = meshes(2, 2)
    for i, mesh in enumerate(decode_meshes):
        loads.loader.decode(mesh, i, loads.table)
    for mesh in prefill_meshes:
        loads.loader.prefill(mesh)
    # Packed weights cannot be merged into: the base is read again for the isolated LoRA module,
    # whose factors are among the adapters too.
    again = 2 if backend == "cpu_ffi" else 1
    assert loads.counts == {
        "the base": again, "lora": 1, "other-lora": 1, "full": 1, BASE: 1, "isolated-lora": 2
    }  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_aliases_outlive_what_they_were_made_from(backend: str) -> None:
    made = models(num_layers=1)
    loads = Loads(made, backend)
    (prefill_mesh,), (decode_mesh,) = meshes(1, 1)
    groups = loads.loader.decode(decode_mesh, 0, loads.table)
    expected = jax.tree.map(lambda a: np.array(a, copy=True), groups[BASE].weights)
    weights = loads.loader.prefill(prefill_mesh)[BASE]
    del groups, loads
    gc.collect()
    filler = [np.full(array.size, 7, np.float32) for array in jax.tree.leaves(weights)]
    jax.tree.map(np.testing.assert_array_equal, weights, expected)
    assert len(filler) == len(jax.tree.leaves(expected))


def test_split_weights_are_aliased_part_by_part() -> None:
    """On meshes of two devices, and not between meshes of unlike size."""
    loads = Loads(models(), "xla")
    (prefill_mesh,), (decode_mesh,) = meshes(1, 1, degree=2)
    decode = loads.loader.decode(decode_mesh, 0, loads.table)[BASE].weights
    prefill = loads.loader.prefill(prefill_mesh)[BASE]
    assert pointers(prefill) == pointers(decode)
    kernel = prefill["layers.0.mlp.up.kernel"]
    assert [shard.data.shape for shard in kernel.addressable_shards] == [(48, 32)] * 2
    np.testing.assert_array_equal(kernel, decode["layers.0.mlp.up.kernel"])

    (one,), _ = meshes(1, 1)
    whole = loads.loader.prefill(one)[BASE]["layers.0.mlp.up.kernel"]
    assert not same_memory(one, prefill_mesh)
    np.testing.assert_array_equal(whole, kernel)
    assert whole.sharding.device_set == {one.devices.item()}


def test_both_sides_of_one_mesh_have_the_same_arrays() -> None:
    loads = Loads(models(), "cpu_ffi")
    (mesh,), _ = meshes(1, 1)
    group = loads.loader.decode(mesh, 0, loads.table)[BASE]
    assert loads.loader.prefill(mesh)[BASE] is group.weights


def test_memory_that_cannot_be_aliased_is_copied() -> None:
    (source,), (target,) = meshes(1, 1)
    memory = np.arange(65, dtype=np.float32)[1:]
    array = jax.device_put(memory, jax.sharding.NamedSharding(source, jax.P()))
    copy = alias_on({"a": array}, source, target)["a"]
    np.testing.assert_array_equal(copy, memory)
    assert copy.sharding.device_set == {target.devices.item()}


def test_adapters_go_where_a_lora_module_is_hosted() -> None:
    """The base alone decodes without; full modules have groups of their own."""
    made = models()
    hosts = {"plain": (0, 1), "lora": (1,), "other-lora": (1,), "full": (2,)}
    made.sources = [replace(s, decode_engines=hosts.get(s.name, (3,))) for s in made.sources]
    loads = Loads(made, "cpu_ffi", engines=4)
    _, decode_meshes = meshes(1, 4)
    groups = [loads.loader.decode(m, i, loads.table) for i, m in enumerate(decode_meshes)]
    assert [sorted(g) for g in groups] == [[BASE], [BASE], ["full/full"], [BASE, "full/base"]]
    assert groups[0][BASE].adapters is None
    assert groups[1][BASE].adapters is not None
    assert groups[3][BASE].adapters is not None


def test_isolated_weights_are_those_of_their_model() -> None:
    """Also of a model that is named like the base's weights."""
    made = models()
    loads = Loads(made, "xla")
    (mesh,), _ = meshes(1, 1)
    weights = loads.loader.prefill(mesh)
    assert set(weights) == {BASE, "full/base", "lora/isolated-lora"}
    expected = {BASE: "plain", "full/base": BASE, "lora/isolated-lora": "isolated-lora"}
    for name, model in expected.items():
        for path, weight in made.full_weights[model].items():
            np.testing.assert_array_equal(weights[name][path], weight, err_msg=f"{name} {path}")


def test_an_engine_holds_the_base_once_and_never_donates_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[Any] = []
    for side in ("prefill", "decode"):
        original = getattr(WeightLoader, side)

        def load(self: WeightLoader, *args: Any, original: Any = original) -> Any:
            held.append(original(self, *args))
            return held[-1]

        monkeypatch.setattr(orchestrator.WeightLoader, side, load)
    made = Models(tiny_config())
    made.add_identity("identity")
    made.add_lora("lora", lora_module(made.config, 3, rank=2, targets=("q", "v")))
    config = serve_config(
        prefill=PrefillConfig(chunk_buckets=[16], num_pages=40),
        decode=DecodeConfig(batch_buckets=[4], max_num_seqs=8, replay_buckets=[4], num_pages=28),
    )
    with running(made, config) as client:
        decode, prefill = held
        before = pointers(prefill)
        assert pointers(decode[BASE].weights) == before
        prompt = tuple(range(20))
        replies = [client.submit(name, prompt) for name in made.tails]
        assert [r.wait().tokens for r in replies] == [made.expected(n, prompt) for n in made.tails]
        assert pointers(prefill) == pointers(decode[BASE].weights) == before
