"""A finished run can be made longer: it goes on from its last step."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.convert.orbax import load_weights
from pshare_jax.errors import CheckpointError, ConfigError
from pshare_jax.train.loop import train
from pshare_jax.train.optimizer import step_rates
from pshare_jax.train.report import Reporter
from tests.train.helpers import metrics, train_config

QUIET = Reporter(active=False)


def config_of(base, data, output, **optimizer):
    constant = {"schedule": "constant", "warmup": 0.0}
    return train_config(base, data, output, tail=2, optimizer={**constant, **optimizer})


@pytest.fixture(scope="module")
def short_run(base, data, tmp_path_factory):
    """A run of three steps."""
    config = config_of(base, data, tmp_path_factory.mktemp("short") / "run", max_steps=3)
    train(config, QUIET)
    return config


@pytest.fixture
def finished(short_run, tmp_path):
    """The same, in a folder that may be changed."""
    shutil.copytree(short_run.folder, tmp_path / "run")
    return dataclasses.replace(short_run, output=str(tmp_path / "run"))


def longer(config, **optimizer):
    changed = dataclasses.replace(config.optimizer, **optimizer)
    return dataclasses.replace(config, optimizer=changed)


def test_it_goes_on_to_what_the_longer_run_would_have_been(finished, base, data, tmp_path):
    """With a rate that does not depend on the length, they are the same run."""
    record = train(longer(finished, max_steps=5), QUIET)
    assert record["steps"] == 5
    assert record["extended"] == [{"epochs": 1, "max_steps": 3, "steps": 3}]
    assert [line["step"] for line in metrics(finished.folder) if "loss" in line] == [1, 2, 3, 4, 5]
    assert (finished.folder / "decode_module-3/training.json").is_file()
    straight = config_of(base, data, tmp_path / "straight", max_steps=5)
    train(straight, QUIET)
    ours, theirs = (
        load_weights(folder / "decode_module", dtype=jnp.float32)
        for folder in (finished.folder, straight.folder)
    )
    for name, weight in ours.items():
        np.testing.assert_array_equal(weight, theirs[name])
    # It is finished again, and other things must be as they were.
    assert train(longer(finished, max_steps=5), QUIET) == record
    with pytest.raises(ConfigError, match=r"optimizer.max_steps = 5, not 4"):
        train(longer(finished, max_steps=4), QUIET)
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate = 0.01, not 0.1"):
        train(longer(finished, max_steps=9, learning_rate=0.1), QUIET)


def test_the_rate_is_that_of_the_longer_run(base, data, tmp_path):
    config = train_config(base, data, tmp_path / "run", optimizer={"max_steps": 3, "epochs": 2})
    train(config, QUIET)
    more = longer(config, max_steps=0)
    train(more, QUIET)
    rates = [line["learning_rate"] for line in metrics(config.folder) if "loss" in line]
    short, long = step_rates(config.optimizer, 3), step_rates(more.optimizer, 10)
    assert rates == pytest.approx([*short, *long[3:]])


def test_without_its_last_checkpoint_it_cannot(finished):
    shutil.rmtree(finished.folder / "checkpoints")
    with pytest.raises(CheckpointError, match="checkpoint of its last step is gone"):
        train(longer(finished, max_steps=4), QUIET)


def test_the_longer_plan_is_kept_when_it_is_stopped(finished):
    from pshare_jax.train.loop import StopRequestedError

    more = longer(finished, max_steps=5)
    with pytest.raises(StopRequestedError, match="after step 4"):
        train(more, QUIET, should_stop=lambda: True)
    assert not (finished.folder / "decode_module").exists()
    kept = json.loads((finished.folder / "run.json").read_text())
    assert kept["config"]["optimizer"]["max_steps"] == 5
    with pytest.raises(ConfigError, match=r"optimizer.max_steps = 5, not 3"):
        train(finished, QUIET)
    assert train(more, QUIET)["steps"] == 5
