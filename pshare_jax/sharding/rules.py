"""Which array axis is split over the devices of a mesh: one table of logical axis names.

Shardings only say where data lies. Computations run under GSPMD, which inserts whatever
communication their operands' shardings ask for, so a layout that cannot be split evenly costs
memory, never correctness.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from jax.sharding import Mesh, NamedSharding, PartitionSpec

TENSOR = "tensor"
"""The only mesh axis: tensor parallelism."""

MESH_AXES: dict[str | None, str | None] = {
    "vocab": TENSOR,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "mlp": TENSOR,
    "embed": None,
    "head_dim": None,
    None: None,
}
"""Logical axis name -> mesh axis, or None for an axis that is replicated."""


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

    An axis is split over its mesh axis when its size is a multiple of the number of devices
    there, and replicated otherwise. So KV heads are replicated on a mesh of a higher degree than
    their number while the query heads that read them are still split.

    Args:
        mesh: has the axis `tensor`.
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
    names = [MESH_AXES[axis] for axis in axes]
    split = [
        name if name is not None and size % mesh.shape[name] == 0 else None
        for size, name in zip(shape, names, strict=True)
    ]
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
