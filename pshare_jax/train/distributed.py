"""Starting JAX: virtual devices on CPU, and several processes."""

from __future__ import annotations

import os

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from pshare_jax.errors import ConfigError
from pshare_jax.runtime_files import compilation_cache_folder
from pshare_jax.sharding.mesh import request_cpu_devices
from pshare_jax.sharding.rules import DATA, FSDP, TENSOR
from pshare_jax.train.config import DistributedConfig, MeshConfig, TrainConfig

AUTOMATIC = "auto"


def start(config: TrainConfig) -> None:
    """Starts JAX as the configuration says; once a process, before anything else uses JAX.

    Raises:
        ConfigError: process numbers that are missing or contradict each other, or a coordinator
            that cannot be reached.
    """
    # As in the server: a folder that the environment names goes before the configured one.
    if config.compilation_cache_dir and jax.config.values["jax_compilation_cache_dir"] is None:
        folder = compilation_cache_folder(config.compilation_cache_dir)
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if not _join(config.distributed):
        request_cpu_devices(config.mesh.size)


def _join(config: DistributedConfig) -> bool:
    coordinator = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if not coordinator:
        return False
    if coordinator == AUTOMATIC:
        arguments = {}
    else:
        processes = config.num_processes or _number("JAX_NUM_PROCESSES", 0)
        process = config.process_id if config.process_id >= 0 else _number("JAX_PROCESS_ID", -1)
        if not 0 <= process < processes:
            raise ConfigError(
                f"distributed: process_id {process} of num_processes {processes} at {coordinator}; "
                "set both (flags, or JAX_PROCESS_ID and JAX_NUM_PROCESSES), counting from 0"
            )
        arguments = {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process,
        }
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"distributed.coordinator: {coordinator}: {' '.join(str(error).split())}"
        ) from error
    return True


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable)
    try:
        return default if text is None else int(text)
    except ValueError as error:
        raise ConfigError(f"{variable} is {text!r}; it must be an integer") from error


def wait_for_all(name: str) -> None:
    """Waits until all processes, if there are several, have come to the point `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh of all processes, with the axes `data`, `fsdp` and `tensor`.

    Raises:
        ConfigError: too few devices, or several processes and devices left over.
    """
    devices = jax.devices()
    if len(devices) < config.size or (jax.process_count() > 1 and len(devices) != config.size):
        raise ConfigError(
            f"mesh: data {config.data} x fsdp {config.fsdp} x tensor {config.tensor} needs "
            f"{config.size} devices, but there are {len(devices)} ({devices[0].platform}) in "
            f"{jax.process_count()} processes"
        )
    grid = np.asarray(devices[: config.size]).reshape(config.data, config.fsdp, config.tensor)
    return Mesh(grid, (DATA, FSDP, TENSOR))
