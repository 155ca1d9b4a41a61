"""From checkpoints to weights on the meshes of engines."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pshare_jax.config import DecodeConfig
from pshare_jax.core.models import ModelSpec
from pshare_jax.engine.adapter_stack import AdapterStack, check_room
from pshare_jax.engine.sources import BASE, BaseSource, ModelSource, own_weights, prefill_weights
from pshare_jax.engine.weight_format import LoadTensors
from pshare_jax.errors import CheckpointError
from pshare_jax.kernels.backends import on_mesh
from pshare_jax.kernels.decoder_layer.packing import PackedAdapters
from pshare_jax.kernels.native.loading import BESIDE_OTHERS
from pshare_jax.models.lora import LoraModule, merge, stack_adapters
from pshare_jax.models.packed import holds_packed, is_packed, pack_adapters, pack_weights
from pshare_jax.models.quantise import quantise
from pshare_jax.models.weights import (
    Weights,
    alias_on,
    lora_specs,
    same_memory,
    weight_specs,
)
from pshare_jax.runtime.executor import GroupWeights
from pshare_jax.runtime.host_memory import return_freed_memory
from pshare_jax.sharding.rules import replicated, weight_shardings

SPARE = "spare"
"""Name of weights that no model has: the base's, in the place of a full module's."""

T = TypeVar("T")


class WeightLoader:
    """Loads weights onto meshes: what several meshes of a CPU read is in memory once.

    Weights are only read, never donated. So meshes of virtual CPU devices have the same memory, and
    so have the prefill and the decode side of one mesh.

    Args:
        base: the prefill module.
        sources: the served models.
        backend: the kernel backend; see `models.packed.is_packed`.
        room: for modules that are loaded later.
        dtype: of weights.

    Attributes:
        dtype: see above.

    Raises:
        ConfigError: the served models are more than there is room for.
    """

    def __init__(
        self,
        base: BaseSource,
        sources: list[ModelSource],
        backend: str,
        room: DecodeConfig | None = None,
        dtype: Any = jnp.float32,
    ):
        self.dtype = dtype
        self._base = base
        self._sources = sources
        self._backend = backend
        self._room = room or DecodeConfig()
        self.stack: AdapterStack | None = None
        if self._room.max_loras:
            self.stack = AdapterStack(
                base.config, self._room.max_loras, self._room.max_lora_rank, dtype
            )
        certificates = [source.certificate for source in sources]
        ranks = [c.lora_rank for c in certificates if c is not None and c.lora_rank is not None]
        check_room([source.kind for source in sources], ranks, self._room)
        self._made: dict[tuple[str, Mesh], Any] = {}

    def prefill(self, mesh: Mesh) -> dict[str, Weights]:
        """What one prefill mesh needs, by `ModelSpec.prefill_weights`: the base's weights, and
        those of each isolated model that has others."""
        weights = {BASE: self._base_weights(mesh)}
        base = functools.cache(lambda: self._plain(weights[BASE], mesh))
        for source in self._sources:
            name = prefill_weights(source)
            if name == BASE:
                continue
            if source.kind == "lora":
                make = functools.partial(self._merged, base, source, mesh)
            else:
                make = functools.partial(self._full, source.load, mesh)
            weights[name] = self._once(name, mesh, make)
        return weights

    def decode(
        self, mesh: Mesh, engine: int, table: Mapping[str, ModelSpec]
    ) -> dict[str, GroupWeights]:
        """What one decode mesh needs, by `ModelSpec.group`: each full module's weights, and for
        the base itself and LoRA modules the base's, with the adapters if there is one of them."""
        hosted = [s for s in self._sources if f"decode{engine}" in table[s.name].decode_workers]
        groups = {
            table[source.name].group: GroupWeights(
                self._once(
                    own_weights(source), mesh, functools.partial(self._full, source.load, mesh)
                )
            )
            for source in hosted
            if source.kind == "full"
        }
        kinds = {source.kind for source in hosted}
        if kinds & {"identity", "lora"} or self.stack is not None:
            adapters = None
            if "lora" in kinds or self.stack is not None:
                adapters = self._once("adapters", mesh, lambda: self._adapters(mesh))
            groups[BASE] = GroupWeights(self._base_weights(mesh), adapters)
        if self._room.max_full and "full" not in kinds:
            # So that what a full module needs is compiled.
            groups[SPARE] = GroupWeights(self._base_weights(mesh))
        return groups

    def built(self) -> None:
        """All meshes have what they need: what they give up later need not be kept here."""
        self._made.clear()

    def full_on(self, source: ModelSource, meshes: Sequence[Mesh]) -> list[GroupWeights]:
        """A full module's weights on each of the decode meshes, loaded now."""
        return [GroupWeights(weights) for weights in self._on_each(meshes, source)]

    def _on_each(self, meshes: Sequence[Mesh], source: ModelSource) -> list[Weights]:
        made: list[Weights] = []
        for number, mesh in enumerate(meshes):
            twin = next((i for i in range(number) if same_memory(meshes[i], mesh)), None)
            if twin is None:
                full = self._full(source.load, mesh, BESIDE_OTHERS)
                made.append(jax.block_until_ready(full))
            else:
                made.append(alias_on(made[twin], meshes[twin], mesh))
        return made

    def adapters_on(
        self, stack: AdapterStack, meshes: Sequence[Mesh]
    ) -> list[Weights | PackedAdapters]:
        """Stacked adapters on each of the decode meshes, made now."""
        return [jax.block_until_ready(self._stacked(stack, mesh, BESIDE_OTHERS)) for mesh in meshes]

    def lora_factors(self, source: ModelSource, mesh: Mesh) -> LoraModule:
        """A LoRA module's factors, read now.

        Raises:
            CheckpointError: the certificate lacks what a LoRA module has.
        """
        return self._lora(source, mesh)

    def _once(self, name: str, mesh: Mesh, make: Callable[[], T]) -> T:
        """What `make` gives for `mesh`, unless that is in the mesh's memory already."""
        if (name, mesh) not in self._made:
            twin = next((m for n, m in self._made if n == name and same_memory(m, mesh)), None)
            if twin is not None:
                self._made[name, mesh] = alias_on(self._made[name, twin], twin, mesh)
            else:
                self._made[name, mesh] = jax.block_until_ready(make())
                return_freed_memory()
        return self._made[name, mesh]

    def _base_weights(self, mesh: Mesh) -> Weights:
        return self._once(BASE, mesh, lambda: self._full(self._base.load, mesh))

    def _full(self, load: LoadTensors, mesh: Mesh, nice: int = 0) -> Weights:
        return self._packed(load(self._shardings(mesh)), mesh, nice)

    def _plain(self, base: Weights, mesh: Mesh) -> Weights:
        """The base's weights in plain form, by name, of those that the steps of `mesh` read."""
        config = self._base.config
        if config.weight_format == "plain":
            return self._base.load(self._shardings(mesh)) if holds_packed(base) else base
        load = self._base.load_plain
        if load is None:
            raise CheckpointError(f"the base's weights are there as {config.weight_format} only")
        return load(weight_shardings(mesh, weight_specs(config.with_weights("plain"))))

    def _merged(self, base: Callable[[], Weights], source: ModelSource, mesh: Mesh) -> Weights:
        merged = merge(base(), self._lora(source, mesh))
        if self._base.config.weight_format != "plain":
            merged = quantise(self._base.config, merged)
        return self._packed(jax.device_put(merged, self._shardings(mesh)), mesh)

    def _adapters(self, mesh: Mesh) -> Weights | PackedAdapters:
        # All LoRA modules, hosted or not, so that a module's index is the same everywhere.
        modules = [self._lora(s, mesh) for s in self._sources if s.kind == "lora"]
        if self.stack is None:
            return self._placed(stack_adapters(modules), mesh)
        for slot, module in enumerate(modules):
            self.stack.put(slot, module)
        return self._stacked(self.stack, mesh)

    def _stacked(self, stack: AdapterStack, mesh: Mesh, nice: int = 0) -> Weights | PackedAdapters:
        return self._placed(stack.weights(copy=not self._packs(mesh)), mesh, nice)

    def _placed(self, stacked: Weights, mesh: Mesh, nice: int = 0) -> Weights | PackedAdapters:
        """Stacked adapters as the steps of `mesh` read them."""
        if not self._packs(mesh):
            # One at a time, so that what streams copy never queues behind all of them.
            put = functools.partial(jax.device_put, device=replicated(mesh))
            return {name: jax.block_until_ready(put(array)) for name, array in stacked.items()}
        packed = pack_adapters(self._base.config, stacked, nice)
        # A CPU takes the host's memory as it is, but copies from device to device.
        factors = jax.device_put(np.asarray(packed.factors), replicated(mesh))
        return dataclasses.replace(packed, factors=factors)

    def _packed(self, weights: Weights, mesh: Mesh, nice: int = 0) -> Weights:
        """`weights` as the steps of `mesh` read them."""
        return pack_weights(self._base.config, weights, nice) if self._packs(mesh) else weights

    def _packs(self, mesh: Mesh) -> bool:
        return is_packed(on_mesh(self._backend, mesh.size), self._base.config)

    def _shardings(self, mesh: Mesh) -> dict[str, Any]:
        return weight_shardings(mesh, weight_specs(self._base.config))

    def _lora(self, source: ModelSource, mesh: Mesh) -> LoraModule:
        certificate = source.certificate
        if certificate is None or certificate.lora_rank is None or not certificate.lora_targets:
            raise CheckpointError(f"{source.name}: a LoRA module without a LoRA certificate")
        names = lora_specs(self._base.config, certificate.lora_rank, certificate.lora_targets)
        return certificate.lora_module(source.load(dict.fromkeys(names, replicated(mesh))))
