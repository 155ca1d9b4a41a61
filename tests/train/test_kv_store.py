"""The frozen module's KV is kept in memory or on disk, and gives the same losses."""

import jax
import numpy as np
import pytest

from pshare_jax.models.decoder import init_weights
from pshare_jax.train.batches import MicroBatch
from pshare_jax.train.config import KVCacheConfig
from pshare_jax.train.data import Example, Turn
from pshare_jax.train.kv_store import kv_bytes, open_store
from pshare_jax.train.layout import choose_buckets, make_row
from pshare_jax.train.loop import train
from pshare_jax.train.loss import Recipe, base_kv
from pshare_jax.train.report import Reporter
from tests.train.helpers import MODEL, losses, train_config

RNG = np.random.default_rng(0)
ROWS = [
    make_row(Example(RNG.integers(0, 400, n, dtype=np.int32), (Turn(n - 2, n),), "file:1"), 1)
    for n in (9, 5, 12, 7)
]
BUCKETS, ASSIGNED = choose_buckets(ROWS, 1)
NEEDED = sum(len(row.prompt) for row in ROWS) * MODEL.num_layers * 2 * 2 * 16 * 4


compiled_kv = jax.jit(base_kv, static_argnums=0)


@pytest.mark.parametrize("where", ["memory_gb", "disk_gb"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_kv_is_what_the_prefill_module_gives(tmp_path, where, dtype):
    budget = KVCacheConfig(**{"memory_gb": 0, where: 1.0})
    store, message = open_store(MODEL, ROWS, dtype, budget, tmp_path)
    assert store is not None
    assert where.removesuffix("_gb") in message
    weights = init_weights(MODEL, 0)

    def compute(prompt: np.ndarray) -> np.ndarray:
        return np.asarray(compiled_kv(Recipe(MODEL, dtype), weights, prompt))

    done = []
    store.fill(ROWS, BUCKETS, ASSIGNED, 2, compute, done.append)
    assert sum(done) == len(ROWS)
    kv = store.load(MicroBatch(BUCKETS[0], (2, 0)), 3)
    assert kv.shape == (3, BUCKETS[0].prompt, MODEL.num_layers, 2, 2, 16)
    assert kv.dtype.name == dtype
    for i, row in enumerate((ROWS[2], ROWS[0])):
        length = len(row.prompt)
        padded = np.zeros((2, BUCKETS[0].prompt), np.int32)
        padded[1, :length] = row.prompt
        alone = compute(padded)[1, :length]
        np.testing.assert_allclose(
            kv[i, :length].astype(np.float32),
            alone.astype(np.float32),
            rtol=1e-5 if dtype == "float32" else 0.05,
            atol=1e-5 if dtype == "float32" else 0.05,
        )
        assert not kv[i, length:].any()
    assert not kv[2].any()
    # The file has no name any more: it goes with the process, however that ends.
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("memory", "disk", "expected"),
    [
        (NEEDED, 0, "kept in memory"),
        (NEEDED - 1, NEEDED, "kept on disk"),
        (NEEDED - 1, NEEDED - 1, "computed anew"),
    ],
)
def test_budgets_decide(tmp_path, memory, disk, expected):
    assert kv_bytes(MODEL, ROWS, "float32") == NEEDED
    budget = KVCacheConfig(memory_gb=memory / 1e9, disk_gb=disk / 1e9)
    store, message = open_store(MODEL, ROWS, "float32", budget, tmp_path)
    assert expected in message
    assert (store is None) == (expected == "computed anew")


def test_same_losses_without_keeping(base, data, held_out, plain_run, tmp_path):
    config = train_config(
        base,
        data,
        tmp_path / "run",
        tail=2,
        data={"eval": [held_out]},
        optimizer={"epochs": 2},
        kv_cache=KVCacheConfig(memory_gb=0),
    )
    train(config, Reporter(active=False))
    kept = losses(plain_run.folder)
    assert len(kept) == 10
    np.testing.assert_allclose(losses(tmp_path / "run"), kept, rtol=1e-5)
