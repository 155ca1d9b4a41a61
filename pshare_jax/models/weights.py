"""The canonical description of a module's weights: names, shapes and logical axes, once.

Weights travel as one flat dict, `{dotted name: array}`: a flat pytree that jit flattens in C++.
Matrices are stored input axes first, so that `x @ kernel` needs no transpose.
Loading, sharding, initialisation and checks all read this table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pshare_jax.errors import CheckpointError
from pshare_jax.models.config import Experts, ModelConfig
from pshare_jax.models.registry import family
from pshare_jax.models.weight_formats import EightBits, eight_bits

Weights = dict[str, Any]
"""`{name: array}`; arrays are jax.Array, numpy.ndarray or ShapeDtypeStruct."""

SCALE = "_scale"
"""What the name of a kernel's scales has at its end."""

ATTENTION_TARGETS = ("q", "k", "v", "o")
LORA_TARGETS = (*ATTENTION_TARGETS, "gate", "up", "down")


@dataclass(frozen=True)
class WeightSpec:
    """Shape of one weight, the logical axis name of each dimension (None: replicated), and its
    dtype where it is not that of activations."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: str | None = None

    @property
    def inputs(self) -> int:
        """Of a kernel or an embedding: how many numbers one of its outputs is made of."""
        if self.axes[0] == "vocab":
            return self.shape[1]
        sizes = zip(self.shape, self.axes, strict=True)
        kept = [(size, axis) for size, axis in sizes if axis != "expert"]
        return math.prod(size for size, _ in (kept[:2] if kept[0][1] == "heads" else kept[:1]))


def projection_path(target: str) -> str:
    """Path of a projection below its layer: `q` -> `attn.q`, `gate` -> `mlp.gate`."""
    return f"attn.{target}" if target in ATTENTION_TARGETS else f"mlp.{target}"


def projection_specs(config: ModelConfig, layer: int = 0) -> dict[str, WeightSpec]:
    """The kernels of a layer's projections by target name (`q` .. `down`), those of experts apart.

    A layer with experts has the first four.
    """
    e, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    h, kh = config.num_heads, config.num_kv_heads
    attention = {
        "q": WeightSpec((e, h, d), ("embed", "heads", "head_dim")),
        "k": WeightSpec((e, kh, d), ("embed", "kv_heads", "head_dim")),
        "v": WeightSpec((e, kh, d), ("embed", "kv_heads", "head_dim")),
        "o": WeightSpec((h, d, e), ("heads", "head_dim", "embed")),
    }
    if config.layer(layer).experts is not None:
        return attention
    return attention | {
        "gate": WeightSpec((e, f), ("embed", "mlp")),
        "up": WeightSpec((e, f), ("embed", "mlp")),
        "down": WeightSpec((f, e), ("mlp", "embed")),
    }


def expert_specs(config: ModelConfig, experts: Experts) -> dict[str, WeightSpec]:
    """The kernels of a feed-forward block with experts, by name."""
    e, f, count = config.hidden_size, experts.intermediate_size, experts.count
    return {
        "router": WeightSpec((e, count), ("embed", None)),
        "gate": WeightSpec((count, e, f), ("expert", "embed", "mlp")),
        "up": WeightSpec((count, e, f), ("expert", "embed", "mlp")),
        "down": WeightSpec((count, f, e), ("expert", "mlp", "embed")),
    }


def expert_bias_specs(config: ModelConfig, experts: Experts) -> dict[str, WeightSpec]:
    """The biases of a feed-forward block with experts, by name."""
    e, f, count = config.hidden_size, experts.intermediate_size, experts.count
    return {
        "router": WeightSpec((count,), (None,)),
        "gate": WeightSpec((count, f), ("expert", "mlp")),
        "up": WeightSpec((count, f), ("expert", "mlp")),
        "down": WeightSpec((count, e), ("expert", "embed")),
    }


def used_parameters(config: ModelConfig) -> int:
    """Elements of all layers' kernels that one token is multiplied by; of experts its own."""
    total = 0
    for i, layer in enumerate(config.layer_specs):
        total += sum(math.prod(spec.shape) for spec in projection_specs(config, i).values())
        if (experts := layer.experts) is not None:
            router, *kernels = expert_specs(config, experts).values()
            all_ = sum(math.prod(spec.shape) for spec in kernels)
            total += math.prod(router.shape) + all_ * experts.per_token // experts.count
    return total


def layer_weight_specs(config: ModelConfig, layer: int) -> dict[str, WeightSpec]:
    """The weights of one layer of the shared blocks, in checkpoint order."""
    e, d, h, kh = config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads
    norm = WeightSpec((e,), (None,))
    before, after = config.norms != "after", config.norms != "before"
    has_bias = {
        **dict.fromkeys(("q", "k", "v"), config.qkv_bias),
        "o": config.o_bias,
        **dict.fromkeys(("gate", "up", "down"), config.mlp_bias),
    }
    specs: dict[str, WeightSpec] = {"attn_norm.scale": norm} if before else {}
    for target, spec in projection_specs(config, layer).items():
        path = projection_path(target)
        specs[f"{path}.kernel"] = spec
        if has_bias[target]:
            inputs = 2 if target == "o" else 1
            specs[f"{path}.bias"] = WeightSpec(spec.shape[inputs:], spec.axes[inputs:])
    if config.qk_norm:
        for name, heads, axis in (("q", h, "heads"), ("k", kh, "kv_heads")):
            specs[f"attn.{name}_norm.scale"] = (
                WeightSpec((d,), (None,))
                if config.qk_norm_scope == "head"
                else WeightSpec((heads, d), (axis, "head_dim"))
            )
    if config.attention_sinks:
        specs["attn.sinks"] = WeightSpec((h,), ("heads",))
    if after:
        specs["attn_post_norm.scale"] = norm
    if before:
        specs["mlp_norm.scale"] = norm
    if (experts := config.layer(layer).experts) is not None:
        for name, spec in expert_specs(config, experts).items():
            specs[f"experts.{name}.kernel"] = spec
        if experts.biases:
            biases = expert_bias_specs(config, experts).items()
            specs |= {f"experts.{name}.bias": spec for name, spec in biases}
    if after:
        specs["mlp_post_norm.scale"] = norm
    return specs


def weight_specs(config: ModelConfig) -> dict[str, WeightSpec]:
    """Every weight of a full module, in checkpoint order.

    Raises:
        CheckpointError: the architecture is not known.
    """
    known = family(config.architecture)
    e, v = config.hidden_size, config.vocab_size
    specs = {"embed.embedding": WeightSpec((v, e), ("vocab", "embed"))}
    for i in range(config.num_layers):
        of_layer = known.layer_weights(config, i) or layer_weight_specs(config, i)
        specs |= {f"layers.{i}.{name}": spec for name, spec in of_layer.items()}
    specs["final_norm.scale"] = WeightSpec((e,), (None,))
    if not config.tie_word_embeddings:
        specs["lm_head.kernel"] = WeightSpec((e, v), ("embed", "vocab"))
    form = eight_bits(config.weight_format)
    if form is None:
        return specs
    plain = set() if form.head else {"lm_head.kernel"}
    if not (form.tied_embedding and config.tie_word_embeddings):
        plain.add("embed.embedding")
    narrow = {n for n in specs if n.endswith((".kernel", ".embedding"))} - plain
    return _with_scales(specs, narrow, form)


def _with_scales(
    specs: dict[str, WeightSpec], narrow: set[str], form: EightBits
) -> dict[str, WeightSpec]:
    """Those in `narrow` as numbers of 8 bits, with their scales."""
    quantised: dict[str, WeightSpec] = {}
    for name, spec in specs.items():
        if name not in narrow:
            quantised[name] = spec
            continue
        outputs = slice(2 if name.endswith(".o.kernel") else 1, None)
        if spec.axes[0] == "vocab":
            outputs = slice(1)
        quantised[name] = WeightSpec(spec.shape, spec.axes, form.dtype)
        quantised[name + SCALE] = WeightSpec(spec.shape[outputs], spec.axes[outputs], "float32")
    return quantised


@functools.lru_cache(maxsize=16)
def narrow_specs(config: ModelConfig) -> dict[str, WeightSpec]:
    """The weights of a full module that have 8 bits, without their scales."""
    form = eight_bits(config.weight_format)
    specs = weight_specs(config).items()
    return {} if form is None else {name: spec for name, spec in specs if spec.dtype == form.dtype}


def lora_targets(config: ModelConfig) -> tuple[str, ...]:
    """The projections that LoRA modules of a base may adapt: experts are not among them."""
    return ATTENTION_TARGETS if config.has_experts else LORA_TARGETS


def lora_specs(
    config: ModelConfig, rank: int, targets: Sequence[str] = LORA_TARGETS
) -> dict[str, WeightSpec]:
    """Every weight of a LoRA decode module of one rank.

    For a kernel `[*in, *out]` the factors are `lora_a [*in, rank]` and `lora_b [rank, *out]`
    (`o` has in = heads, head_dim); the update is `(alpha / rank) * a @ b`.

    Raises:
        CheckpointError: a target that modules of this base cannot adapt.
    """
    for target in targets:
        if target not in lora_targets(config):
            raise CheckpointError(
                f"LoRA on {target}: a {config.architecture} with experts can be adapted on "
                f"{', '.join(lora_targets(config))}"
            )
    specs: dict[str, WeightSpec] = {}
    for i in range(config.num_layers):
        kernels = projection_specs(config, i)
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
    """The weights as ShapeDtypeStructs of one dtype, but for those that have their own."""
    return {
        name: jax.ShapeDtypeStruct(spec.shape, spec.dtype or dtype) for name, spec in specs.items()
    }


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
