"""Carving the devices of a machine into the meshes of the engines."""

# jax says the types of its functions in part only.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from pshare_jax.errors import ConfigError
from pshare_jax.sharding.rules import TENSOR, replicated


def carve(
    devices: Sequence[Any],
    prefill_engines: int,
    prefill_tp: int,
    decode_engines: int,
    decode_tp: int,
) -> tuple[list[Mesh], list[Mesh]]:
    """Gives every engine a mesh of its own: first the prefill engines, then the decode engines.

    Args:
        devices: `jax.devices()`; taken in order, those left over stay unused.
        prefill_engines: number of prefill engines, at least 1.
        prefill_tp: devices of one prefill engine (its tensor-parallel degree), at least 1.
        decode_engines: number of decode engines, at least 1.
        decode_tp: devices of one decode engine, at least 1.

    Returns:
        The prefill meshes and the decode meshes, each with the one axis `tensor`.

    Raises:
        ConfigError: a number below 1, or too few devices.
    """
    counts = {
        "prefill.engines": prefill_engines,
        "prefill.tensor_parallel": prefill_tp,
        "decode.engines": decode_engines,
        "decode.tensor_parallel": decode_tp,
    }
    for key, count in counts.items():
        if count < 1:
            raise ConfigError(f"{key} is {count}; it must be at least 1")
    needed = prefill_engines * prefill_tp + decode_engines * decode_tp
    if len(devices) < needed:
        asked = ", ".join(f"{key}={count}" for key, count in counts.items())
        platform = devices[0].platform if devices else jax.default_backend()
        raise ConfigError(_too_few(f"{asked} need", needed, len(devices), platform))
    prefill = carve_one(devices, prefill_engines, prefill_tp)
    rest = devices[prefill_engines * prefill_tp :]
    return prefill, carve_one(rest, decode_engines, decode_tp)


def carve_one(devices: Sequence[Any], engines: int, degree: int) -> list[Mesh]:
    """Meshes of `degree` devices each, with the one axis `tensor`.

    Raises:
        ConfigError: too few devices.
    """
    if len(devices) < engines * degree:
        platform = devices[0].platform if devices else jax.default_backend()
        raise ConfigError(
            _too_few(
                f"engines={engines}, tensor_parallel={degree} need",
                engines * degree,
                len(devices),
                platform,
            )
        )
    return [
        Mesh(np.asarray(devices[i * degree : (i + 1) * degree]), (TENSOR,)) for i in range(engines)
    ]


def mesh_of_all_processes(devices: Sequence[Any], degree: int, processes: int) -> Mesh:
    """One mesh over the devices of several processes, as many of each.

    Args:
        devices: `jax.devices()`, those of all processes.
        degree: devices of the mesh, a multiple of `processes`.
        processes: number of processes.

    Raises:
        ConfigError: a process has too few devices.
    """
    each = degree // processes
    taken: list[Any] = []
    for process in range(processes):
        own = [device for device in devices if device.process_index == process]
        if len(own) < each:
            raise ConfigError(
                f"tensor_parallel={degree} over {processes} processes needs {each} devices of each "
                f"of them, but process {process} has {len(own)} ({devices[0].platform})"
            )
        taken += own[:each]
    return Mesh(np.asarray(taken), (TENSOR,))


def meet(mesh: Mesh) -> None:
    """Has the processes of a mesh compute something together, and waits for it.

    They must come here at about the same time: connections of collectives are made now, and who
    makes them gives up after a while. What follows may take as long as it likes.
    """
    ones = put(np.ones(mesh.size, np.int32), NamedSharding(mesh, PartitionSpec(TENSOR)))
    jax.block_until_ready(jax.jit(jnp.sum, out_shardings=replicated(mesh))(ones))


def spans_processes(mesh: Mesh) -> bool:
    """Whether other processes have devices of a mesh.

    A mesh of a machine that is not here, for which programs are only compiled, spans none.
    """
    return jax.process_count() > 1 and mesh.is_multi_process


def put(array: Any, sharding: Sharding) -> jax.Array:
    """An array of the host on devices; of several processes each puts its own shards there.

    Args:
        array: the whole array; the same in all processes.
        sharding: where it goes.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    # `device_put` would compare the array among the processes.
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


def request_cpu_devices(count: int) -> None:
    """Asks for at least `count` virtual CPU devices, which takes effect when JAX starts.

    Does nothing on a machine whose JAX has started with enough devices of any kind already.

    Raises:
        ConfigError: JAX has started with fewer devices.
    """
    try:
        # Never fewer than somebody has asked for before.
        wanted = max(count, jax.config.jax_num_cpu_devices)  # type: ignore[attr-defined]
        jax.config.update("jax_num_cpu_devices", wanted)
    except RuntimeError as error:
        devices = jax.devices()
        if len(devices) < count:
            message = _too_few("the engines need", count, len(devices), devices[0].platform)
            raise ConfigError(f"{message}; JAX has already started in this process") from error


def _too_few(who: str, needed: int, there: int, platform: str) -> str:
    message = f"{who} {needed} devices, but there are {there} ({platform})"
    if platform != "cpu":
        return f"{message}; use fewer engines or a lower tensor_parallel"
    return (
        f"{message}; before JAX starts, set jax.config.update('jax_num_cpu_devices', {needed}) "
        f"or the environment variable JAX_NUM_CPU_DEVICES={needed}"
    )
