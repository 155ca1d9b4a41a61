"""The canonical description of a module's weights: names, shapes and logical axes, once.

Weights travel as one flat dict, `{dotted name: array}`: a flat pytree that jit flattens in C++.
Matrices are stored input axes first, so that `x @ kernel` needs no transpose.
Loading, sharding, initialisation and checks all read this table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pshare_jax.errors import CheckpointError
from pshare_jax.models.config import ModelConfig

Weights = dict[str, Any]
"""`{name: array}`; arrays are jax.Array, numpy.ndarray or ShapeDtypeStruct."""

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class WeightSpec:
    """Shape of one weight and the logical axis name of each dimension (None: replicated)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def projection_path(target: str) -> str:
    """Path of a projection below its layer: `q` -> `attn.q`, `gate` -> `mlp.gate`."""
    return f"attn.{target}" if target in ("q", "k", "v", "o") else f"mlp.{target}"


def projection_specs(config: ModelConfig) -> dict[str, WeightSpec]:
    """The kernels of one layer's seven projections by target name (`q` .. `down`)."""
    e, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    h, kh = config.num_heads, config.num_kv_heads
    return {
        "q": WeightSpec((e, h, d), ("embed", "heads", "head_dim")),
        "k": WeightSpec((e, kh, d), ("embed", "kv_heads", "head_dim")),
        "v": WeightSpec((e, kh, d), ("embed", "kv_heads", "head_dim")),
        "o": WeightSpec((h, d, e), ("heads", "head_dim", "embed")),
        "gate": WeightSpec((e, f), ("embed", "mlp")),
        "up": WeightSpec((e, f), ("embed", "mlp")),
        "down": WeightSpec((f, e), ("mlp", "embed")),
    }


def weight_specs(config: ModelConfig) -> dict[str, WeightSpec]:
    """Every weight of a full module, in checkpoint order."""
    e, d, v = config.hidden_size, config.head_dim, config.vocab_size
    specs = {"embed.embedding": WeightSpec((v, e), ("vocab", "embed"))}
    for i in range(config.num_layers):
        prefix = f"layers.{i}."
        specs[prefix + "attn_norm.scale"] = WeightSpec((e,), (None,))
        for target, spec in projection_specs(config).items():
            specs[f"{prefix}{projection_path(target)}.kernel"] = spec
            if config.qkv_bias and target in ("q", "k", "v"):
                specs[f"{prefix}attn.{target}.bias"] = WeightSpec(spec.shape[1:], spec.axes[1:])
        if config.qk_norm:
            specs[prefix + "attn.q_norm.scale"] = WeightSpec((d,), (None,))
            specs[prefix + "attn.k_norm.scale"] = WeightSpec((d,), (None,))
        specs[prefix + "mlp_norm.scale"] = WeightSpec((e,), (None,))
    specs["final_norm.scale"] = WeightSpec((e,), (None,))
    if not config.tie_word_embeddings:
        specs["lm_head.kernel"] = WeightSpec((e, v), ("embed", "vocab"))
    return specs


def lora_specs(
    config: ModelConfig, rank: int, targets: Sequence[str] = LORA_TARGETS
) -> dict[str, WeightSpec]:
    """Every weight of a LoRA decode module of one rank.

    For a kernel `[*in, *out]` the factors are `lora_a [*in, rank]` and `lora_b [rank, *out]`
    (`o` has in = heads, head_dim); the update is `(alpha / rank) * a @ b`.
    """
    specs: dict[str, WeightSpec] = {}
    kernels = projection_specs(config)
    for i in range(config.num_layers):
        for target in targets:
            kernel = kernels[target]
            split = 2 if target == "o" else 1
            path = f"layers.{i}.{projection_path(target)}"
            specs[path + ".lora_a"] = WeightSpec(
                (*kernel.shape[:split], rank), (*kernel.axes[:split], None)
            )
            specs[path + ".lora_b"] = WeightSpec(
                (rank, *kernel.shape[split:]), (None, *kernel.axes[split:])
            )
    return specs


def abstract_weights(specs: dict[str, WeightSpec], dtype: Any) -> Weights:
    """The weights as ShapeDtypeStructs of one dtype."""
    return {name: jax.ShapeDtypeStruct(spec.shape, dtype) for name, spec in specs.items()}


def same_memory(mesh: Mesh, other: Mesh) -> bool:
    """Whether arrays of one mesh can be had on the other by `alias_on`."""
    devices = [*mesh.devices.flat, *other.devices.flat]
    of_one_host = len({device.process_index for device in devices}) == 1
    return mesh.size == other.size and of_one_host and {d.platform for d in devices} == {"cpu"}


def alias_on(tree: Any, source: Mesh, target: Mesh) -> Any:
    """Arrays that lie on one CPU mesh, on another mesh of the same process, in the same memory.

    Virtual CPU devices share the host's memory, and arrays that nobody donates are only read. An
    array that JAX cannot alias (alignment) is copied.

    Args:
        tree: arrays laid out on `source` by NamedShardings.
        source: where they lie.
        target: where they are wanted; `same_memory` of the two must hold.

    Returns:
        The arrays, laid out on `target` likewise; they keep the memory alive for as long as needed.
    """
    place = dict(zip(source.devices.flat, target.devices.flat, strict=True))

    def alias(array: jax.Array) -> jax.Array:
        # JAX copies from device to device, but takes host memory as it is.
        parts = [
            jax.device_put(np.asarray(shard.data), place[shard.device])
            for shard in array.addressable_shards
        ]
        assert isinstance(array.sharding, NamedSharding)
        sharding = NamedSharding(target, array.sharding.spec)
        return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)

    return jax.tree.map(alias, tree)


def check_weights(config: ModelConfig, weights: Weights) -> None:
    """Checks the names and shapes of a full module's weights against `config`.

    Raises:
        CheckpointError: names the first weight that is missing, unexpected or misshapen.
    """
    specs = weight_specs(config)
    for name, spec in specs.items():
        if name not in weights:
            raise CheckpointError(f"{name}: missing from the weights of a {config.architecture}")
        if (shape := tuple(weights[name].shape)) != spec.shape:
            raise CheckpointError(
                f"{name}: shape {list(shape)}, but the model's config needs {list(spec.shape)}"
            )
    for name in weights:
        if name not in specs:
            raise CheckpointError(f"{name}: unexpected in the weights of a {config.architecture}")
