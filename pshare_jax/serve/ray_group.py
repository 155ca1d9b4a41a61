"""Where Ray puts the processes of one mesh: a placement group with a bundle for each of them."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pshare_jax.launch_config import RayResources, RayStrategy
from pshare_jax.serve.ray_process import ray_errors

log = logging.getLogger(__name__)


def bundle_of(asked: RayResources) -> dict[str, float]:
    """What one process asks for, as Ray names it; without what it asks nothing of."""
    named = {"CPU": asked.cpus, "GPU": asked.gpus, **asked.resources}
    return {name: float(amount) for name, amount in named.items() if amount}


def strategy_of(
    wanted: RayStrategy,
    hosts: Sequence[Mapping[str, float]],
    bundle: Mapping[str, float],
    size: int,
) -> str:
    """How Ray is to divide so many bundles among hosts.

    Args:
        wanted: `cluster.ray.strategy`.
        hosts: what each that is alive has in all.
        bundle: what one process asks for.
        size: number of processes.

    Returns:
        `STRICT_SPREAD`, a host each, where there are hosts enough that could have one; else `PACK`.
    """
    able = sum(all(has.get(name, 0.0) >= need for name, need in bundle.items()) for has in hosts)
    return "STRICT_SPREAD" if wanted == "spread" and able >= size else "PACK"


class RayGroup:
    """The places of a gang. They stay its own until `remove`, whoever dies meanwhile.

    Args:
        ray: the module, which is connected.
        name: of the group in Ray, by which another launcher finds it.
    """

    def __init__(self, ray: Any, name: str):
        self._ray = ray
        self._name = name
        self._group: Any = None

    def place(self, wanted: RayStrategy, asked: RayResources, size: int) -> Any:
        """Has Ray find places; gives what can be waited for until it has them.

        Raises:
            ValueError: nothing is asked for by which places could be found.
        """
        bundle = bundle_of(asked)
        hosts = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        strategy = strategy_of(wanted, hosts, bundle, size)
        log.info("%s: %d places of %s, %s", self._name, size, bundle, strategy)
        self._group = self._ray.util.placement_group(
            [bundle] * size, strategy, name=self._name, lifetime="detached"
        )
        return self._group.ready()

    def strategy(self, rank: int) -> Any:
        """The place of one process, as an actor's scheduling strategy."""
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        return strategies.PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=rank
        )

    def remove(self) -> None:
        """Gives the places back, also those of another launcher's group of that name; what runs
        there is to have ended."""
        with contextlib.suppress(*ray_errors(self._ray)):
            group = self._group or self._ray.util.get_placement_group(self._name)
            self._ray.util.remove_placement_group(group)
