"""Accelerators to compile for without having them: topologies, and what the hardware can do."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

from pshare_jax.errors import ConfigError

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 2 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""XLA's description of an H100 SXM, which the CUDA compiler takes in place of a device."""


_CUDA = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")


@dataclass(frozen=True)
class Accelerator:
    """One kind of machine, and how its devices are divided.

    Args:
        name: as in tables and on the command line.
        platform: `tpu` or `cuda`.
        topology: the platform's name of the topology.
        prefill: devices of the prefill mesh.
        decode: devices of the decode mesh.
        memory: bytes of one device that a program may use.
        bandwidth: bytes a second of one device's memory.
        peak: bfloat16 operations a second of one device.
        link: bytes a second from one device to others of the machine, in one direction.
    """

    name: str
    platform: str
    topology: str
    prefill: int
    decode: int
    memory: float
    bandwidth: float
    peak: float
    link: float

    @property
    def backend(self) -> str:
        """The kernels for this platform."""
        return "pallas_tpu" if self.platform == "tpu" else "pallas_gpu"

    def devices(self) -> list[Any]:
        """Its devices, for meshes and shardings of what is compiled.

        Raises:
            ConfigError: the platform's compiler is not installed.
        """
        packages = ("libtpu",) if self.platform == "tpu" else _CUDA
        if not any(map(_is_installed, packages)):
            raise ConfigError(
                f"{self.name}: its compiler, {packages[0]}, is not installed; `make test-compile` "
                "sets up an environment that has it"
            )
        from jax.experimental import topologies

        if self.platform == "tpu":
            topology = topologies.get_topology_desc(topology_name=self.topology, platform="tpu")
        else:
            topology = topologies.get_topology_desc(
                topology_name="h100",
                platform="cuda",
                topology=self.topology,
                target_config=_H100,
            )
        return list(topology.devices)


# Bandwidth, peak and link (half of the published two-way figure) are the vendors' (Cloud TPU system
# architecture; NVIDIA H100 SXM data sheet, dense); memory is what the compilers accept. A chip of
# TPU7x (Ironwood) is two devices, to each of which half of the chip's figures belong.
ACCELERATORS = {
    a.name: a
    for a in (
        Accelerator("v5e:2x4", "tpu", "v5e:2x4", 4, 4, 15.75 * 2**30, 819e9, 197e12, 200e9),
        Accelerator("v5p:2x2x1", "tpu", "v5p:2x2x1", 2, 2, 95.74 * 2**30, 2765e9, 459e12, 600e9),
        Accelerator("v6e:2x4", "tpu", "v6e:2x4", 4, 4, 31.25 * 2**30, 1640e9, 918e12, 400e9),
        Accelerator(
            "tpu7x:2x2x1", "tpu", "tpu7x:2x2x1", 4, 4, 94.75 * 2**30, 3690e9, 1153e12, 300e9
        ),
        Accelerator("h100", "cuda", "1x1x2", 1, 1, 84942979072, 3352e9, 989e12, 450e9),
    )
}


def prepare() -> None:
    """Lets the accelerators' compilers start on a machine without accelerators.

    Must run before JAX does; the environment's own values win.
    """
    import jax

    defaults = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    # Programs for devices that are not there can be stored, but not loaded again.
    jax.config.update("jax_enable_compilation_cache", False)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
