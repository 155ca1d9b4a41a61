"""How models can be laid out over a machine's devices, and whether they fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pshare_jax.bench.accelerators import Accelerator
from pshare_jax.bench.plan.costs import (
    Efficiency,
    Roofline,
    kv_bytes,
    lora_bytes,
    weight_bytes,
)
from pshare_jax.bench.plan.specs import EngineSpec, ServerSpec, SystemSpec
from pshare_jax.config import DecodeConfig
from pshare_jax.models.config import ModelConfig

Modules = Literal["full", "lora"]


@dataclass(frozen=True)
class Engines:
    """Settings of all engines of a plan.

    Args:
        page_size: tokens of a page.
        chunk_buckets: prefill chunk lengths.
        batch_buckets: decode batch sizes.
        replay_buckets: chunk lengths on the decode side.
        max_num_seqs: sequences at once on one decode engine.
        reserve: share of a device's memory that is neither weights nor KV.
        lora_rank: of LoRA modules, over all projections.
        least_sequences: sequences of full length that a pool must hold for a layout to count as
            one that fits.
    """

    page_size: int = 64
    chunk_buckets: list[int] = field(default_factory=lambda: [128, 512, 2048])
    batch_buckets: list[int] = field(default_factory=lambda: [4, 16, 64, 256])
    replay_buckets: list[int] = field(default_factory=lambda: [128])
    max_num_seqs: int = 256
    reserve: float = 0.1
    lora_rank: int = 16
    least_sequences: int = 4


@dataclass(frozen=True)
class Machine:
    """`devices` accelerators of one kind, and one architecture to serve on them."""

    chip: Accelerator
    devices: int
    model: ModelConfig
    efficiency: Efficiency
    engines: Engines

    @property
    def name(self) -> str:
        """As in tables."""
        return f"{self.devices} x {self.chip.name.partition(':')[0]}"

    def pool_pages(self, mesh: int, weights: float, share: float = 1.0) -> int:
        """Pages of KV beside `weights` bytes on a mesh; `share` is the pool's of what is left."""
        memory = self.chip.memory * (1 - self.engines.reserve) * mesh
        page = kv_bytes(self.model) * self.engines.page_size
        return max(int(share * (memory - weights) // page), 0)

    def costs(self, mesh: int, adapters: int = 0) -> Roofline:
        """Costs on a mesh of that many devices."""
        return Roofline(
            self.chip,
            self.efficiency,
            self.model,
            mesh,
            self.engines.page_size,
            adapters * lora_bytes(self.model, self.engines.lora_rank),
        )

    def meshes(self, devices: int) -> list[int]:
        """Sizes of meshes into which devices can be divided: powers of two, at most one device a
        KV head, since more would each hold copies."""
        sizes = (2**i for i in range(self.model.num_kv_heads.bit_length()))
        return [n for n in sizes if n <= self.model.num_kv_heads and devices % n == 0]


@dataclass(frozen=True)
class Layout:
    """Models on a machine's devices.

    Args:
        shared: one prefill for all models, or one for each.
        modules: full ones, or LoRA on the base's weights.
        models: number of models.
        prefill_devices: devices that only prefill; 0 where each mesh does both.
        prefill_mesh: devices of one prefill engine.
        decode_devices: devices that decode.
        decode_mesh: devices of one decode engine.
        hosted: modules whose weights each decode engine holds.
        apart: each model has such a system of its own.
    """

    shared: bool
    modules: Modules
    models: int
    prefill_devices: int
    prefill_mesh: int
    decode_devices: int
    decode_mesh: int
    hosted: int
    apart: bool = False

    @property
    def split(self) -> str:
        """Prefill to decode devices of the machine, as in tables."""
        times = self.models if self.apart else 1
        if not self.prefill_devices:
            return f"{times * self.decode_devices} for both"
        return f"{times * self.prefill_devices}:{times * self.decode_devices}"

    @property
    def loaded_engines(self) -> float:
        """Decode engines that could do all of the work if each were as busy as the busiest: fewer
        than there are where some models have one more engine than others."""
        engines = self.decode_devices // self.decode_mesh
        if self.hosted == self.models or self.apart:
            return engines
        return self.models * (engines * self.hosted // self.models) / self.hosted

    @property
    def name(self) -> str:
        """In words, for tables."""
        if self.apart:
            return f"{self.prefill_devices + self.decode_devices} device(s) for each model"
        hosted = "LoRA" if self.modules == "lora" else f"{self.hosted} of {self.models} modules"
        return f"TP {self.prefill_mesh} + TP {self.decode_mesh}, {hosted} on each"


def split_layouts(
    machine: Machine, models: int, modules: Modules, shared: bool
) -> Iterator[Layout]:
    """Every split of a machine into prefill and decode engines, fitting or not.

    Full modules lie on every decode engine, or are divided among them: fewer weights on each, but
    each model has fewer engines.
    """
    for prefill in range(1, machine.devices):
        decode = machine.devices - prefill
        for prefill_mesh in machine.meshes(prefill):
            for decode_mesh in machine.meshes(decode):
                count = decode // decode_mesh
                for hosted in _hosted(models, count) if modules == "full" else [models]:
                    yield Layout(
                        shared, modules, models, prefill, prefill_mesh, decode, decode_mesh, hosted
                    )


def _hosted(models: int, engines: int) -> range:
    return range(-(-models // engines), models + 1)


def isolated_layouts(machine: Machine, models: int) -> Iterator[Layout]:
    """Full modules that do not share: each model has servers of its own on its own devices."""
    each = machine.devices // models
    if each == 0:
        return
    for mesh in machine.meshes(each):
        yield Layout(False, "full", models, 0, mesh, each, mesh, 1, apart=True)
    for prefill in range(1, each):
        for mesh in machine.meshes(prefill):
            if (each - prefill) % mesh == 0:
                yield Layout(False, "full", models, prefill, mesh, each - prefill, mesh, 1, True)


@dataclass(frozen=True)
class Fit:
    """Memory of a layout: weights over the memory of each kind of device, and tokens of KV that
    one pool of each kind holds."""

    prefill_weights: float
    decode_weights: float
    prefill_tokens: int
    decode_tokens: int
    fits: bool


def fit(machine: Machine, layout: Layout, longest: int) -> Fit:
    """Whether weights and pools fit; `longest` is the tokens of the longest sequence."""
    prefill, decode = _pages(machine, layout)
    engines = machine.engines
    memory = machine.chip.memory
    return Fit(
        weight_bytes(machine.model) / (memory * layout.prefill_mesh),
        _decode_weights(machine, layout) / (memory * layout.decode_mesh),
        prefill * engines.page_size,
        decode * engines.page_size,
        min(prefill, decode) > _least(machine, longest),
    )


def memory_rows(machine: Machine, lora_modules: int, longest: int) -> list[dict[str, Any]]:
    """What fits on meshes of each size: tokens of KV beside a prefill module, the most full decode
    modules and the KV beside them, and the KV beside so many LoRA modules; 0 is too little.

    `longest` is the tokens of the longest sequence.
    """

    def tokens(weights: float, mesh: int) -> int:
        pages = machine.pool_pages(mesh, weights)
        return pages * machine.engines.page_size if pages > _least(machine, longest) else 0

    rows, one = [], weight_bytes(machine.model)
    adapters = lora_modules * lora_bytes(machine.model, machine.engines.lora_rank)
    for mesh in machine.meshes(machine.devices):
        if mesh < machine.devices:
            most = 0
            while tokens((most + 1) * one, mesh):
                most += 1
            rows.append(
                {
                    "machine": machine.name,
                    "mesh": mesh,
                    "weights": one / (machine.chip.memory * mesh),
                    "prefill_tokens": tokens(one, mesh),
                    "most_modules": most,
                    "most_modules_tokens": tokens(most * one, mesh) if most else 0,
                    "lora_modules": lora_modules,
                    "lora_tokens": tokens(one + adapters, mesh),
                }
            )
    return rows


def _least(machine: Machine, longest: int) -> int:
    return machine.engines.least_sequences * -(-longest // machine.engines.page_size)


def _decode_weights(machine: Machine, layout: Layout) -> float:
    if layout.modules == "lora":
        adapters = layout.models * lora_bytes(machine.model, machine.engines.lora_rank)
        return weight_bytes(machine.model) + adapters
    return layout.hosted * weight_bytes(machine.model)


def _pages(machine: Machine, layout: Layout) -> tuple[int, int]:
    """Pages of one prefill and of one decode pool."""
    if not layout.prefill_devices:
        half = machine.pool_pages(layout.decode_mesh, weight_bytes(machine.model), share=0.5)
        return half, half
    return (
        machine.pool_pages(layout.prefill_mesh, weight_bytes(machine.model)),
        machine.pool_pages(layout.decode_mesh, _decode_weights(machine, layout)),
    )


def system_spec(machine: Machine, layout: Layout) -> SystemSpec:
    """The layout as servers of the simulation; it must fit."""
    groups = [[m] for m in range(layout.models)] if layout.apart else [list(range(layout.models))]
    each = layout.prefill_devices + layout.decode_devices
    return SystemSpec(
        [_server(machine, layout, models, i * each) for i, models in enumerate(groups)]
    )


def _server(machine: Machine, layout: Layout, models: list[int], first: int) -> ServerSpec:
    engines = machine.engines
    prefill_pages, decode_pages = _pages(machine, layout)
    adapters = layout.models if layout.modules == "lora" else 0
    prefill_costs = machine.costs(layout.prefill_mesh)
    decode_costs = machine.costs(layout.decode_mesh, adapters)
    count = layout.decode_devices // layout.decode_mesh
    placed = _placed(models, layout.hosted, count)
    decode = [EngineSpec(decode_costs, decode_pages, first + i, m) for i, m in enumerate(placed)]
    both = not layout.prefill_devices
    prefill = [
        EngineSpec(prefill_costs, prefill_pages, first + i + (0 if both else count))
        for i in range(count if both else layout.prefill_devices // layout.prefill_mesh)
    ]
    return ServerSpec(
        models=models,
        shared=layout.shared,
        one_group=layout.modules == "lora",
        page_size=engines.page_size,
        chunk_buckets=engines.chunk_buckets,
        settings=DecodeConfig(
            max_num_seqs=engines.max_num_seqs,
            batch_buckets=engines.batch_buckets,
            replay_buckets=engines.replay_buckets,
        ),
        prefill=prefill,
        decode=decode,
    )


def _placed(models: list[int], hosted: int, engines: int) -> list[list[int]]:
    """Which models lie on each engine: in turn, `hosted` on each."""
    if hosted >= len(models):
        return [list(models) for _ in range(engines)]
    return [[models[(i * hosted + k) % len(models)] for k in range(hosted)] for i in range(engines)]
