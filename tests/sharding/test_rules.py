"""The table of logical axes and what follows from it."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pshare_jax.models.config import ModelConfig
from pshare_jax.models.weights import lora_specs, weight_specs
from pshare_jax.sharding.rules import (
    pool_sharding,
    replicated,
    sharding_for,
    weight_shardings,
)

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)


def mesh_of(degree: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()[:degree]), ("tensor",))


def test_every_weight_axis_by_degree():
    expected = {
        "embed.embedding": P("tensor", None),
        "layers.0.attn_norm.scale": P(None),
        "layers.0.attn.q.kernel": P(None, "tensor", None),
        "layers.0.attn.k.kernel": P(None, "tensor", None),
        "layers.0.attn.v.kernel": P(None, "tensor", None),
        "layers.0.attn.o.kernel": P("tensor", None, None),
        "layers.0.mlp.gate.kernel": P(None, "tensor"),
        "layers.0.mlp.up.kernel": P(None, "tensor"),
        "layers.0.mlp.down.kernel": P("tensor", None),
        "layers.0.mlp_norm.scale": P(None),
        "final_norm.scale": P(None),
        "lm_head.kernel": P(None, "tensor"),
    }
    shardings = weight_shardings(mesh_of(2), weight_specs(CONFIG))
    assert {name: sharding.spec for name, sharding in shardings.items()} == expected


def test_kv_heads_are_replicated_beyond_their_number():
    shardings = weight_shardings(mesh_of(4), weight_specs(CONFIG))
    assert shardings["layers.0.attn.q.kernel"].spec == P(None, "tensor", None)
    assert shardings["layers.0.attn.k.kernel"].spec == P(None, None, None)
    assert pool_sharding(mesh_of(4), 2).spec == P(None, None, None, None, None)
    assert pool_sharding(mesh_of(2), 2).spec == P(None, None, "tensor", None, None)


def test_lora_factors_follow_their_kernels():
    shardings = weight_shardings(mesh_of(2), lora_specs(CONFIG, rank=4, targets=["q", "o"]))
    assert shardings["layers.0.attn.q.lora_a"].spec == P(None, None)
    assert shardings["layers.0.attn.q.lora_b"].spec == P(None, "tensor", None)
    assert shardings["layers.0.attn.o.lora_a"].spec == P("tensor", None, None)
    assert shardings["layers.0.attn.o.lora_b"].spec == P(None, None)


def test_an_array_is_really_split():
    kernel = np.arange(6 * 8, dtype=np.float32).reshape(6, 8)
    placed = jax.device_put(kernel, sharding_for(mesh_of(4), kernel.shape, ("embed", "mlp")))
    shards = {shard.device.id: np.asarray(shard.data) for shard in placed.addressable_shards}
    for i, device in enumerate(jax.devices()[:4]):
        np.testing.assert_array_equal(shards[device.id], kernel[:, 2 * i : 2 * i + 2])
    everywhere = jax.device_put(kernel, replicated(mesh_of(4)))
    assert all(shard.data.shape == (6, 8) for shard in everywhere.addressable_shards)


def test_other_spec_classes_will_do():
    @dataclass
    class Spec:
        shape: tuple[int, ...]
        axes: tuple[str | None, ...]

    shardings = weight_shardings(mesh_of(2), {"w": Spec((4, 3), ("vocab", "mlp"))})
    assert shardings["w"].spec == P("tensor", None)


def test_bad_axes_are_named():
    with pytest.raises(ValueError, match="unknown logical axis 'hedas'"):
        sharding_for(mesh_of(2), (4,), ("hedas",))
    with pytest.raises(ValueError, match="has 2 axes"):
        sharding_for(mesh_of(2), (4, 4), ("heads",))
