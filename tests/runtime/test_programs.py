from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pshare_jax.config import DecodeConfig
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.runtime.programs import Programs
from pshare_jax.runtime.steps import StepSpec
from pshare_jax.sharding.mesh import carve_one
from tests.helpers import tiny_config


def test_whatever_may_run_is_wrapped() -> None:
    """Warming up too: a program that one process of a mesh runs alone leaves the others waiting."""
    config, mesh = tiny_config(), carve_one(jax.devices(), 1, 1)[0]
    decode = DecodeConfig(batch_buckets=[1], replay_buckets=[4])
    layout = PageLayout.of(config, 8, jnp.float32)
    programs = Programs(StepSpec(config, "xla", mesh), layout, mesh, 32, [8], decode)
    made: list[Any] = []

    def wrapper(name: str, function: Any) -> Any:
        made.append(lambda *arguments: function(*arguments))
        return made[-1]

    programs.wrap(wrapper)
    calls = list(programs.all_calls())
    assert {"checksum", "chunk", "decode"} <= {call.name for call in calls}
    assert all(call.function in made for call in calls)
    assert programs.checksum_beside in made
