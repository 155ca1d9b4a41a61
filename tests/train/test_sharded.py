"""The same loss curve on eight devices as on one."""

import numpy as np

from pshare_jax.train.config import MeshConfig
from pshare_jax.train.loop import train
from pshare_jax.train.report import Reporter
from tests.train.helpers import losses, train_config


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
