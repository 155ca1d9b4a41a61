"""What an engine needs of JAX before it is built: devices, dtype, caches, and who lies where."""

from __future__ import annotations

import os
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pshare_jax.config import ServeConfig
from pshare_jax.errors import ConfigError
from pshare_jax.kernels.backends import CPU_FFI, backend_for
from pshare_jax.kernels.kv_dtype import FP8
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.packed import unsupported
from pshare_jax.runtime_files import compilation_cache_folder
from pshare_jax.sharding.mesh import carve, carve_one, request_cpu_devices

DEVICE_COUNT_VARIABLE = "JAX_NUM_CPU_DEVICES"


@dataclass(frozen=True)
class Meshes:
    """The meshes of an engine's workers.

    With `one_pool` the prefill worker and the decode worker of each number share a mesh and its
    pool. So they do where a mesh may do `either`; but there the first `num_prefill` meshes begin
    with prefill and the others with decode, and pages are moved between them. With `one_processor`
    all meshes are virtual devices of one CPU.
    """

    prefill: list[Mesh]
    decode: list[Mesh]
    one_pool: bool
    one_processor: bool
    num_prefill: int = 0

    @property
    def either(self) -> bool:
        """Whether each mesh may do prefill or decode."""
        return self.num_prefill > 0


def place(config: ServeConfig) -> Meshes:
    """Divides this machine's devices among the workers.

    Raises:
        ConfigError: there are too few, or the sides differ where they are to share a mesh.
    """
    prefill, decode, devices = config.prefill, config.decode, jax.devices()
    for side, values in (("prefill", prefill), ("decode", decode)):
        if values.hosts != 1:
            raise ConfigError(
                f"{side}.hosts: {values.hosts} hosts have a mesh together in a cluster only, where "
                "each worker has processes of its own (cluster.launcher)"
            )
    one_processor = devices[0].platform == "cpu"
    needed = num_devices(config)
    one_pool = config.connector == "same-mesh" or (
        config.connector == "auto" and len(devices) < needed
    )
    if not one_pool:
        meshes = carve(
            devices,
            prefill.engines,
            prefill.tensor_parallel,
            decode.engines,
            decode.tensor_parallel,
        )
        if config.router.roles == "flexible":
            both = [*meshes[0], *meshes[1]]
            return Meshes(both, both, False, one_processor, num_prefill=len(meshes[0]))
        return Meshes(*meshes, one_pool=False, one_processor=one_processor)
    for key in ("engines", "tensor_parallel"):
        if getattr(prefill, key) != getattr(decode, key):
            raise ConfigError(
                f"prefill.{key} is {getattr(prefill, key)} and decode.{key} "
                f"{getattr(decode, key)}: they must be equal where prefill and decode share meshes "
                f"(connector is {config.connector}, {needed} devices would be needed for meshes "
                f"of their own, there are {len(devices)})"
            )
    if config.router.roles == "flexible":
        raise ConfigError(
            "router.roles: `flexible` needs a mesh for each engine of either side: "
            f"{needed} devices, there are {len(devices)} (connector is {config.connector})"
        )
    shared = carve_one(devices, decode.engines, decode.tensor_parallel)
    return Meshes(shared, shared, one_pool=True, one_processor=one_processor)


def num_devices(config: ServeConfig) -> int:
    """Devices that the workers need, each side with meshes of its own unless configured."""
    sides = (config.decode,) if config.connector == "same-mesh" else (config.prefill, config.decode)
    return sum(side.engines * side.tensor_parallel for side in sides)


def page_dtype(config: ServeConfig, model: ModelConfig | None = None) -> jnp.dtype:
    """The dtype of KV pages: 8 bits, or what is computed in. Arguments as for `compute_dtype`.

    Raises:
        ConfigError: there are no kernels for pages of 8 bits on this platform.
    """
    if config.kv_dtype == "auto":
        return compute_dtype(config, model)
    if jax.default_backend() == "tpu":
        raise ConfigError(
            f"kv_dtype: the kernels for TPUs do not read {config.kv_dtype}; leave it at auto"
        )
    return FP8


def compute_dtype(config: ServeConfig, model: ModelConfig | None = None) -> jnp.dtype:
    """The dtype of weights and activations, and of KV unless `kv_dtype` says another.

    Unless configured it is bfloat16, but float32 on CPUs where XLA does the products, which in
    bfloat16 are slow.

    Args:
        config: the serving configuration.
        model: the base's architecture; None for one that the C++ layers compute.

    Raises:
        ConfigError: weights in a form that is not for these devices.
    """
    if config.weights == "int8-dynamic" and jax.default_backend() != "cpu":
        raise ConfigError(
            f"weights: int8-dynamic is for CPUs, but JAX runs on {jax.default_backend()}; use int8"
        )
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    platform = jax.default_backend()
    if platform != "cpu":
        return jnp.dtype(jnp.bfloat16)
    tensor_parallel = max(config.prefill.tensor_parallel, config.decode.tensor_parallel)
    if tensor_parallel > 1 or backend_for(config.kernel_backend, platform) != CPU_FFI:
        return jnp.dtype(jnp.float32)
    in_xla = model is not None and unsupported(model) is not None
    return jnp.dtype(jnp.float32 if in_xla else jnp.bfloat16)


def prepare_jax(config: ServeConfig) -> None:
    """Sets up virtual CPU devices and the compilation cache; before JAX is first used.

    A number of devices that the environment says is left alone: with too few for meshes of their
    own, prefill and decode share one.

    Raises:
        ConfigError: JAX is running already with too few CPU devices.
    """
    if config.connector != "auto" or DEVICE_COUNT_VARIABLE not in os.environ:
        request_cpu_devices(num_devices(config))
    if config.compilation_cache_dir and jax.config.values["jax_compilation_cache_dir"] is None:
        folder = str(compilation_cache_folder(config.compilation_cache_dir))
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
