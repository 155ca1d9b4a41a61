"""Which array axis is split over the devices of a mesh: one table of logical axis names.

Shardings only say where data lies. Computations run under GSPMD, which inserts whatever
communication their operands' shardings ask for, so a layout that cannot be split evenly costs
memory, never correctness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from jax.sharding import Mesh, NamedSharding, PartitionSpec

TENSOR = "tensor"
"""Mesh axis of tensor parallelism: the only one of a serving mesh."""
DATA = "data"
"""Mesh axis of data parallelism, in training."""
EXPERT = "expert"
"""Mesh axis over which experts are split, of meshes that have one."""
FSDP = "fsdp"
"""Mesh axis over which training splits the batch and the weights too."""

MESH_AXES: dict[str | None, tuple[str, ...]] = {
    "batch": (DATA, FSDP),
    "vocab": (TENSOR,),
    "heads": (TENSOR,),
    "kv_heads": (TENSOR,),
    "mlp": (TENSOR,),
    "expert": (EXPERT,),
    "embed": (FSDP,),
    "head_dim": (),
    None: (),
}
"""Logical axis name -> the mesh axes it is split over, of those that a mesh has."""


class ArraySpec(Protocol):
    """What is needed to know of an array: its shape and the logical name of each axis."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each axis."""
        ...

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical name of each axis."""
        ...


def sharding_for(mesh: Mesh, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> NamedSharding:
    """How an array is laid out on `mesh`.

    An axis is split over its mesh axes when its size is a multiple of the number of devices
    there, and replicated otherwise. So KV heads are replicated on a mesh of a higher degree than
    their number while the query heads that read them are still split.

    Args:
        mesh: has some of the axes `data`, `fsdp`, `tensor` and `expert`.
        shape: the array's shape.
        axes: the logical name of each axis, keys of `MESH_AXES`.

    Raises:
        ValueError: an unknown name, or not one name an axis.
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} has {len(shape)} axes, but the names are {axes}")
    if unknown := [axis for axis in axes if axis not in MESH_AXES]:
        known = sorted(name for name in MESH_AXES if name is not None)
        raise ValueError(f"unknown logical axis {unknown[0]!r}; known ones are {known}")
    split: list[str | tuple[str, ...] | None] = []
    for size, axis in zip(shape, axes, strict=True):
        names = tuple(name for name in MESH_AXES[axis] if name in mesh.shape)
        even = size % math.prod(mesh.shape[name] for name in names) == 0
        match names:
            case (name,) if even:
                split.append(name)
            case (_, _, *_) if even:
                split.append(names)
            case _:
                split.append(None)
    return NamedSharding(mesh, PartitionSpec(*split))


def weight_shardings(mesh: Mesh, specs: Mapping[str, ArraySpec]) -> dict[str, NamedSharding]:
    """The layout of every weight on `mesh`, by the names of `specs`."""
    return {name: sharding_for(mesh, spec.shape, spec.axes) for name, spec in specs.items()}


def pool_sharding(mesh: Mesh, kv_heads: int) -> NamedSharding:
    """The layout of one layer's pages `[num_pages, 2, kv_heads, page_size, head_dim]` on `mesh`.

    Every device holds its KV heads of all pages, so the page tables are the same for all of them.
    """
    return sharding_for(mesh, (1, 2, kv_heads, 1, 1), (None, None, "kv_heads", None, None))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device of `mesh` holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())
