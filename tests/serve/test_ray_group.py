"""How places for the processes of one mesh are asked for, without Ray."""

from __future__ import annotations

import pytest

from pshare_jax.launch_config import RayResources, RayStrategy
from pshare_jax.serve.ray_group import bundle_of, strategy_of

TPU, HEAD = {"CPU": 8.0, "TPU": 4.0}, {"CPU": 64.0}


def test_what_is_not_asked_for_is_in_no_bundle() -> None:
    assert bundle_of(RayResources()) == {"CPU": 1.0}
    asked = RayResources(cpus=0, gpus=2, resources={"slot": 1, "moon": 0})
    assert bundle_of(asked) == {"GPU": 2.0, "slot": 1.0}
    assert bundle_of(RayResources(cpus=0)) == {}


@pytest.mark.parametrize(
    ("wanted", "hosts", "size", "strategy"),
    [
        ("spread", [HEAD, TPU, TPU], 2, "STRICT_SPREAD"),
        ("spread", [HEAD, TPU], 2, "PACK"),
        ("spread", [HEAD, TPU, TPU], 3, "PACK"),
        ("spread", [], 2, "PACK"),
        ("pack", [TPU, TPU], 2, "PACK"),
    ],
)
def test_hosts_that_could_have_one_are_one_each(
    wanted: RayStrategy, hosts: list[dict[str, float]], size: int, strategy: str
) -> None:
    assert strategy_of(wanted, hosts, {"CPU": 1.0, "TPU": 4.0}, size) == strategy
