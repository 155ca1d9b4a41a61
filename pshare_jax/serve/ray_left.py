"""What a launcher has in Ray, as another one of the same name finds it by names."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

NAMESPACE = "pshare_jax"
"""Of actors and placement groups, in Ray."""


@dataclasses.dataclass
class Actors:
    """The actors of one start of a process.

    Args:
        cluster: name of the cluster.
        process: name of the process.
        token: of this start.
        is_gang: whether it is of several hosts, and has a placement group.
        by_rank: its actors; one without a gang.
    """

    cluster: str
    process: str
    token: str
    is_gang: bool = False
    by_rank: dict[int, Any] = dataclasses.field(default_factory=dict[int, Any])

    @property
    def group(self) -> str:
        """Name of its placement group."""
        return f"{self.cluster}/{self.process}/{self.token}"

    def actor(self, rank: int) -> str:
        """Name of an actor."""
        process = f"{self.process}.{rank}" if self.is_gang else self.process
        return f"{self.cluster}/{process}/{self.token}"


def find(ray: Any, cluster: str) -> dict[str, list[Actors]]:
    """What there is of a cluster, by process; of one that has just been ended there may be some."""
    found: dict[str, Actors] = {}

    def of(name: str, *, is_gang: bool) -> tuple[Actors, int] | None:
        front, _, token = name.rpartition("/")
        owner, _, process = front.rpartition("/")
        if owner != cluster:
            return None
        process, _, rank = process.partition(".")
        one = Actors(cluster, process, token, is_gang or bool(rank))
        return found.setdefault(one.group, one), int(rank or 0)

    for name in ray.util.list_named_actors():
        # It may have ended since.
        with contextlib.suppress(ValueError):
            if (place := of(name, is_gang=False)) is not None:
                place[0].by_rank[place[1]] = ray.get_actor(name, namespace=NAMESPACE)
    for group in ray.util.placement_group_table().values():
        # Also one whose actors have not been made.
        if group["state"] != "REMOVED":
            of(group["name"], is_gang=True)
    left: dict[str, list[Actors]] = {}
    for one in found.values():
        left.setdefault(one.process, []).append(one)
    return left
