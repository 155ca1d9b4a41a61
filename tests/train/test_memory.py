"""Long examples in less memory, with the same results; and what a step needs, said before."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.errors import ConfigError
from pshare_jax.models.attention import causal_mask, dense_attention
from pshare_jax.models.weights import weight_specs
from pshare_jax.train import memory, memory_saving
from pshare_jax.train.buckets import Bucket
from pshare_jax.train.job import prepare
from pshare_jax.train.layout import collate
from pshare_jax.train.loop import train
from pshare_jax.train.loss import Recipe, loss_sum
from pshare_jax.train.report import Reporter
from tests.helpers import on_device, tiny_config
from tests.train.helpers import train_config

QUIET = Reporter(active=False)
DEEP = tiny_config(vocab_size=96, num_layers=3, hidden_size=64, intermediate_size=128)


def temporary_bytes(remat: bool, tokens: int = 64, size: int = 16) -> int:
    """Of the compiled gradient of a batch, but for its inputs and results."""
    recipe = Recipe(DEEP, "float32", remat=remat, barriers=False)
    arrays = collate([], Bucket(0, tokens, tokens, tokens), size, teacher=False)
    batch = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in arrays.items() if n != "prompt"}
    specs = weight_specs(DEEP)
    weights = {n: jax.ShapeDtypeStruct(s.shape, jnp.float32) for n, s in specs.items()}
    gradient = jax.jit(jax.grad(lambda w, batch: loss_sum(recipe, w, {}, None, batch)))
    return gradient.lower(weights, batch).compile().memory_analysis().temp_size_in_bytes


def test_remat_keeps_one_layer_instead_of_all():
    """Barriers, which `jax.checkpoint` relies on, are gone on CPUs: it saved a twentieth.

    What is kept does not depend on how much XLA optimises the code.
    """
    assert temporary_bytes(remat=True) < 0.5 * temporary_bytes(remat=False)


@pytest.mark.parametrize("soft_cap", [None, 5.0], ids=str)
def test_attention_in_blocks_is_attention(monkeypatch, soft_cap):
    monkeypatch.setattr(memory_saving, "BLOCK", 16)
    rng = np.random.default_rng(0)
    q, k, v = (
        on_device(rng.normal(size=(2, length, heads, 8)))
        for length, heads in ((41, 4), (57, 2), (57, 2))
    )
    mask = jnp.broadcast_to(causal_mask(jnp.arange(41) + 16, jnp.arange(57), 30), (2, 41, 57))

    def result(attend, q, k, v):
        return jnp.sum(jnp.sin(attend(q, k, v, mask, soft_cap)))

    values, gradients = zip(
        *(
            jax.jit(jax.value_and_grad(functools.partial(result, attend), argnums=(0, 1, 2)))(
                q, k, v
            )
            for attend in (dense_attention, memory_saving.blocked_attention)
        ),
        strict=True,
    )
    assert float(values[0]) == pytest.approx(float(values[1]), rel=1e-5)
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-4)
    text = str(
        jax.make_jaxpr(functools.partial(memory_saving.blocked_attention, soft_cap=None))(
            q, k, v, mask
        )
    )
    assert "f32[2,4,41,57]" not in text, "all scores at once"


@contextlib.contextmanager
def _compilations() -> Iterator[list[str]]:
    """What JAX says that it compiles."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "Compiling" in record.getMessage():
                found.append(record.getMessage())

    logger, keep = logging.getLogger("jax"), Keep()
    logger.addHandler(keep)
    try:
        yield found
    finally:
        logger.removeHandler(keep)


@pytest.fixture(scope="module")
def job(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory") / "run"
    config = train_config(base, data, folder, optimizer={"micro_batch_size": 4})
    return prepare(config, QUIET)


def test_what_a_step_needs_is_what_its_arrays_are(job):
    need = memory.predict(job)
    assert need is not None
    weights = sum(array.nbytes for array in job.trainable.values())
    assert need.optimizer == 2 * weights
    assert need.gradients == 2 * weights  # of a micro-batch, and their sum
    assert need.checkpoint == 0  # nothing is saved while others are computed
    assert need.activations > 0
    assert need.total == sum((need.optimizer, need.gradients, need.activations))


def test_the_program_that_was_asked_is_the_one_that_runs(job):
    """Asking costs no second compilation."""
    memory.predict(job)
    compute = job.computations
    trainable, frozen, kv, batch = memory._arguments(job)
    assert kv is not None
    zeros = {n: np.zeros(s.shape, s.dtype) for n, s in {**batch, "kv": kv}.items()}
    arrays = compute.put(zeros)
    kv = arrays.pop("kv")
    with jax.log_compiles(True), _compilations() as names:
        compute.gradients(trainable, frozen, kv, arrays)
    assert names == []


def test_a_run_that_would_not_fit_is_refused_with_numbers(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 1_000_000)
    config = train_config(base, data, tmp_path / "run", optimizer={"max_steps": 1})
    message = (
        r"a step of 8 x \(\d+ \+ \d+\) tokens is predicted to take [\d.]+ GB more memory: "
        r"optimizer .*gradients .*activations .*but 0.001 GB are free; lower"
    )
    with pytest.raises(ConfigError, match=message):
        train(config, QUIET)
    said: list[str] = []
    monkeypatch.setattr(QUIET, "say", said.append)
    tries = train_config(
        base, data, tmp_path / "tries", memory_check="warn", optimizer={"max_steps": 1}
    )
    assert train(tries, QUIET)["steps"] == 1
    assert any(line.startswith("warning: a step of 8 x") for line in said)


def test_free_memory_is_told_on_this_machine():
    free = memory.free_bytes()
    assert free is None or free > 0
