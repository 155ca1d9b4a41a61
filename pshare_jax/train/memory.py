"""How much memory the first step will take, asked of the compiler before it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pshare_jax.errors import ConfigError
from pshare_jax.models.weights import Weights
from pshare_jax.runtime.host_memory import return_freed_memory
from pshare_jax.train.job import Job
from pshare_jax.train.layout import collate

_GB = 1e9
_MOMENTS = 2


@dataclass(frozen=True)
class Need:
    """Bytes on one device, beyond what is used before the first step.

    Args:
        optimizer: its moments.
        gradients: those of a micro-batch, and the sum when there are several.
        activations: what else the largest micro-batch needs while it is computed.
        checkpoint: the copy of weights and moments that is being written meanwhile.
    """

    optimizer: int
    gradients: int
    activations: int
    checkpoint: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.optimizer + self.gradients + self.activations + self.checkpoint


def check_memory(job: Job, say: Callable[[str], None]) -> None:
    """Predicts what the largest micro-batch takes, tells it, and refuses what does not fit.

    Args:
        job: the run, before its optimizer has a state.
        say: takes a line for the user.

    Raises:
        ConfigError: it does not fit, and `memory_check` is `refuse`.
    """
    config = job.config
    if config.memory_check == "off":
        return
    bucket = _largest_bucket(job)
    need = predict(job)
    if need is None:
        return
    return_freed_memory()
    free = free_bytes()
    # The virtual devices of a CPU are one memory.
    devices = jax.local_device_count() if jax.default_backend() == "cpu" else 1
    devices = min(devices, job.computations.mesh.size)
    wanted = need.total * devices
    text = (
        f"a step of {config.micro_batch_size} x ({bucket.prompt} + {bucket.decode}) tokens is "
        f"predicted to take {_gb(wanted)} more memory: optimizer {_gb(need.optimizer * devices)}, "
        f"gradients {_gb(need.gradients * devices)}, activations "
        f"{_gb(need.activations * devices)}, checkpoint {_gb(need.checkpoint * devices)}"
    )
    if free is None or wanted <= free:
        say(f"{text}; {_gb(free)} are free" if free is not None else text)
        return
    advice = (
        f"{text}, but {_gb(free)} are free; lower optimizer.micro_batch_size or data.max_length, "
        "set remat=true, or train a LoRA"
    )
    if config.memory_check == "refuse":
        raise ConfigError(f"{config.output}: {advice}; memory_check=warn tries it all the same")
    say(f"warning: {advice}")


def predict(job: Job) -> Need | None:
    """What the micro-batch of the largest shape needs; its program is compiled for that, and is
    then the one that runs. None where the compiler does not tell."""
    compiled = job.computations.jitted["gradients"].lower(*_arguments(job)).compile()
    found = compiled.memory_analysis()
    if found is None:
        return None
    weights = sum(_bytes_on_a_device(array) for array in job.trainable.values())
    accumulates = any(len(step) > 1 for step in job.plan.steps)
    saves = bool(job.config.checkpoint.every) or bool(job.evaluation)
    on_host = jax.default_backend() == "cpu"
    inputs = found.argument_size_in_bytes - weights - _frozen_bytes(job.frozen)
    return Need(
        optimizer=_MOMENTS * weights,
        gradients=weights * (2 if accumulates else 1),
        activations=found.temp_size_in_bytes + max(inputs, 0),
        checkpoint=(1 + _MOMENTS) * weights if saves and on_host else 0,
    )


def free_bytes() -> int | None:
    """Memory that is free: of the first device, or of this machine and its cgroup when that is a
    CPU; None where it cannot be told."""
    if jax.default_backend() != "cpu":
        stats = jax.local_devices()[0].memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    found = [amount for amount in (_machine_bytes(), _cgroup_bytes()) if amount is not None]
    return min(found, default=None)


def _largest_bucket(job: Job) -> Any:
    buckets = {micro.bucket for step in job.plan.steps for micro in step}
    return max(buckets, key=lambda b: (b.prompt + 3 * b.decode, b))


def _arguments(job: Job) -> tuple[Any, ...]:
    """Arrays and shapes that the gradients of the largest micro-batch are computed from."""
    bucket, size = _largest_bucket(job), job.config.micro_batch_size
    compute = job.computations
    recipe = compute.recipe
    arrays = collate([], bucket, size, teacher=recipe.teacher is not None)
    prompt = arrays.pop("prompt")
    batch = {name: _shape(job, name, array.shape, array.dtype) for name, array in arrays.items()}
    kv = None
    if prompt.shape[1]:
        config = recipe.config
        token = (config.num_layers, 2, config.num_kv_heads, config.head_dim)
        kv = _shape(job, "kv", (*prompt.shape, *token), jnp.dtype(recipe.dtype))
    return job.trainable, job.frozen, kv, batch


def _shape(job: Job, name: str, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    sharding = job.computations.batch_sharding(name, shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _frozen_bytes(frozen: Mapping[str, Weights]) -> int:
    return sum(_bytes_on_a_device(a) for weights in frozen.values() for a in weights.values())


def _bytes_on_a_device(array: jax.Array) -> int:
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def _machine_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        [line] = [line for line in lines if line.startswith("MemAvailable:")]
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return None


def _cgroup_bytes() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        most = int((folder / "memory.max").read_text())
        return max(most - int((folder / "memory.current").read_text()), 0)
    except (OSError, ValueError):  # no limit is the word max
        return None


def _gb(amount: float) -> str:
    return f"{amount / _GB:.3g} GB"
