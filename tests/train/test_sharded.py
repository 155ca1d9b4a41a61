"""The same loss curve on eight devices as on one."""

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from pshare_jax.models.weights import weight_specs
from pshare_jax.train.config import MeshConfig, OptimizerConfig
from pshare_jax.train.distributed import make_mesh
from pshare_jax.train.loop import train
from pshare_jax.train.loss import Recipe
from pshare_jax.train.optimizer import make_optimizer
from pshare_jax.train.report import Reporter
from pshare_jax.train.step import Computations
from tests.train.helpers import MODEL, losses, train_config


def test_eight_devices_give_the_losses_of_one(base, data, held_out, plain_run, tmp_path):
    folder = tmp_path / "run"
    config = train_config(
        base,
        data,
        folder,
        tail=2,
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        data={"eval": [held_out]},
        optimizer={"epochs": 2},
    )
    record = train(config, Reporter(active=False))
    np.testing.assert_allclose(losses(folder), losses(plain_run.folder), rtol=0, atol=1e-4)
    assert abs(record["eval_loss"] - plain_run.record["eval_loss"]) < 1e-4


def test_weights_moments_and_batches_are_split():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    specs = weight_specs(MODEL)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=2e-5), 10)
    computations = Computations(Recipe(MODEL, "float32"), optimizer, mesh, specs)
    weights = {
        name: jax.device_put(np.zeros(spec.shape, np.float32), sharding)
        for (name, spec), sharding in zip(
            specs.items(), computations.trainable_shardings.values(), strict=True
        )
    }
    state = computations.init_optimizer(weights)
    expected = {
        "embed.embedding": P("tensor", "fsdp"),
        "layers.0.attn.q.kernel": P("fsdp", "tensor", None),
        "layers.1.mlp.down.kernel": P("tensor", "fsdp"),
        "final_norm.scale": P(None),
    }
    moments = optax.tree.get(state, "nu")
    for name, spec in expected.items():
        assert weights[name].sharding.spec == moments[name].sharding.spec == spec
    batch = computations.put(
        {"tokens": np.zeros((8, 4), np.int32), "kv": np.zeros((8, 16, 2, 2, 2, 16), np.float32)}
    )
    rows = ("data", "fsdp")
    assert batch["tokens"].sharding.spec == P(rows, None)
    assert batch["kv"].sharding.spec == P(rows, None, None, None, "tensor", None)
