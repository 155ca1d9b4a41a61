"""Losses and optimizers of the user's own."""

from __future__ import annotations

import sys

import jax
import numpy as np
import optax
import pytest

from pshare_jax.errors import ConfigError
from pshare_jax.train.config import OptimizerConfig
from pshare_jax.train.loop import train
from pshare_jax.train.optimizer import make_optimizer, step_rates
from pshare_jax.train.report import Reporter
from tests.train.helpers import losses, train_config

QUIET = Reporter(active=False)
CODE = """
import jax, jax.numpy as jnp, optax

def smoothed(logits, batch):
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs, batch["labels"][..., None], axis=-1)[..., 0]
    return -0.9 * picked - 0.1 * log_probs.mean(axis=-1)

def twice(logits, batch):
    picked = jnp.take_along_axis(logits, batch["labels"][..., None], axis=-1)[..., 0]
    return 2 * (jax.nn.logsumexp(logits, axis=-1) - picked)

def short(logits, batch):
    return logits[:, :1, 0]

def plain_descent(config, schedule):
    return optax.sgd(schedule)

def rates_at_counts(config, schedule):
    return optax.stateless(lambda counts, params: jax.tree.map(schedule, counts))

def nothing(config, schedule):
    return None
"""


@pytest.fixture
def hooks(tmp_path, monkeypatch):
    """A module in the working directory."""
    (tmp_path / "my_hooks.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield tmp_path / "my_hooks.py"
    sys.modules.pop("my_hooks", None)


def test_a_loss_of_ones_own(base, data, hooks, tmp_path):
    plain = train_config(base, data, tmp_path / "plain", optimizer={"max_steps": 1})
    own = train_config(
        base, data, tmp_path / "own", loss="my_hooks:twice", optimizer={"max_steps": 1}
    )
    train(plain, QUIET)
    record = train(own, QUIET)
    assert losses(own.folder)[0] == pytest.approx(2 * losses(plain.folder)[0], rel=1e-5)
    assert record["sources"].keys() == {"loss"}
    # Other code under the same name is another run.
    hooks.write_text(CODE.replace("return 2 *", "return 3 *"))
    with pytest.raises(ConfigError, match="another loss: its content differs"):
        train(own, QUIET)


def test_an_optimizer_of_ones_own(base, data, hooks, tmp_path):
    config = OptimizerConfig(0.5, "constant", warmup=0.0, factory="my_hooks:plain_descent")
    optimizer = make_optimizer(config, 4)
    params = {"a": jax.numpy.ones(3)}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a"], -0.5)
    run = train_config(
        base,
        data,
        tmp_path / "run",
        optimizer={"max_steps": 3, "learning_rate": 0.5, "factory": "my_hooks:plain_descent"},
    )
    train(run, QUIET)
    curve = losses(run.folder)
    assert curve[-1] < curve[0]


@pytest.mark.parametrize(("kind", "end"), [("linear", 0.0), ("cosine", 0.0), ("constant", 0.5)])
def test_the_schedule_holds_outside_the_run_as_those_of_optax(hooks, kind, end):
    config = OptimizerConfig(0.5, kind, warmup=0.0, factory="my_hooks:rates_at_counts")
    counts = np.array([-1.0, 0.0, 3.0, 4.0, 9.0])
    rates, _ = make_optimizer(config, 4).update(counts, optax.EmptyState())
    inside = step_rates(config, 4)
    np.testing.assert_array_equal(rates, [inside[0], inside[0], inside[3], end, end])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "my_hooks:missing"}, "loss: my_hooks has no function missing"),
        ({"loss": "no_such_hooks:f"}, "loss: no_such_hooks cannot be imported: ModuleNotFound"),
        ({"loss": "my_hooks:short"}, "loss: gave shape"),
        ({"optimizer": {"factory": "my_hooks:nothing"}}, "optimizer.factory: .*gave a NoneType"),
    ],
    ids=["missing", "no module", "shape", "no optimizer"],
)
def test_hooks_that_cannot_be_used(base, data, hooks, tmp_path, fields, message):
    config = train_config(base, data, tmp_path / "run", **fields)
    with pytest.raises(ConfigError, match=message):
        train(config, QUIET)


def test_the_optimizer_is_optax():
    assert issubclass(type(optax.sgd(0.1)), optax.GradientTransformation)
