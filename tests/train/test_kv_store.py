"""The frozen module's KV is kept in memory or on disk, and gives the same losses."""

import errno
import os

import jax
import numpy as np
import pytest

from pshare_jax.core.split_rule import LAST_TOKEN
from pshare_jax.errors import CheckpointError, ConfigError
from pshare_jax.models.decoder import init_weights
from pshare_jax.train.batches import MicroBatch
from pshare_jax.train.buckets import Bucket, choose_buckets
from pshare_jax.train.config import KVCacheConfig
from pshare_jax.train.data import Example, Turn
from pshare_jax.train.kv_store import KVStore, kv_bytes, open_store, store_key
from pshare_jax.train.layout import make_row
from pshare_jax.train.loop import train
from pshare_jax.train.loss import Recipe, base_kv
from pshare_jax.train.report import Reporter
from tests.train.helpers import MODEL, losses, train_config

RNG = np.random.default_rng(0)
ROWS = [
    make_row(
        Example(RNG.integers(0, 400, n, dtype=np.int32), (Turn(n - 2, n),), "file:1"), LAST_TOKEN
    )
    for n in (9, 5, 12, 7)
]
ALL = np.arange(len(ROWS))
BUCKETS, ASSIGNED = choose_buckets(ROWS, 1)
NEEDED = sum(len(row.prompt) for row in ROWS) * MODEL.num_layers * 2 * 2 * 16 * 4


compiled_kv = jax.jit(base_kv, static_argnums=0)


@pytest.mark.parametrize("where", ["memory_gb", "disk_gb"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_kv_is_what_the_prefill_module_gives(tmp_path, where, dtype):
    budget = KVCacheConfig(**{"memory_gb": 0, where: 1.0})
    store, message = open_store(MODEL, ROWS, dtype, budget, tmp_path, "key")
    assert store is not None
    assert where.removesuffix("_gb") in message
    weights = init_weights(MODEL, 0)

    def compute(prompt: np.ndarray) -> np.ndarray:
        return np.asarray(compiled_kv(Recipe(MODEL, dtype), weights, prompt))

    done = []
    store.fill(ALL, BUCKETS, ASSIGNED, 2, compute, done.append)
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
    store, message = open_store(MODEL, ROWS, "float32", budget, tmp_path, "key")
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


KEEP = KVCacheConfig(memory_gb=4, disk_gb=1, keep=True)


def keep_in(folder) -> KVStore:
    store, message = open_store(MODEL, ROWS, "float32", KEEP, folder, "key")
    assert store is not None
    assert str(folder / "kv-key.bin") in message
    return store


def counted(calls: list[int], stop_after: int | None = None):
    """A stand-in for the prefill module: KV that tells its token and position; counts its calls."""

    def compute(prompt: np.ndarray) -> np.ndarray:
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(len(prompt))
        value = prompt * 1000 + np.arange(prompt.shape[1])
        shape = (*prompt.shape, MODEL.num_layers, 2, MODEL.num_kv_heads, MODEL.head_dim)
        return np.broadcast_to(value[..., None, None, None, None], shape).astype(np.float32)

    return compute


def check_contents(store: KVStore) -> None:
    kv = store.load(MicroBatch(BUCKETS[0], (0, 1, 2, 3)), 4)
    for got, row in zip(kv, ROWS, strict=True):
        length = len(row.prompt)
        expected = row.prompt * 1000 + np.arange(length)
        assert (got[:length] == expected[:, None, None, None, None]).all()


def test_a_file_that_stays_is_filled_once(tmp_path):
    first: list[int] = []
    keep_in(tmp_path).fill(ALL, BUCKETS, ASSIGNED, 2, counted(first), lambda _: None)
    assert len(first) == 2
    again: list[int] = []
    reported: list[int] = []
    store = keep_in(tmp_path)
    store.fill(ALL, BUCKETS, ASSIGNED, 2, counted(again), reported.append)
    assert again == []
    assert sum(reported) == len(ROWS)
    assert store.batch_seconds is not None
    check_contents(store)


def test_filling_goes_on_where_it_was_stopped(tmp_path):
    store = keep_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.fill(ALL, BUCKETS, ASSIGNED, 1, counted([], stop_after=3), lambda _: None)
    del store
    rest: list[int] = []
    store = keep_in(tmp_path)
    store.fill(ALL, BUCKETS, ASSIGNED, 1, counted(rest), lambda _: None)
    assert len(rest) == 1
    check_contents(store)


def test_a_removed_file_is_filled_anew(tmp_path):
    keep_in(tmp_path).fill(ALL, BUCKETS, ASSIGNED, 2, counted([]), lambda _: None)
    (tmp_path / "kv-key.bin").unlink()
    assert (tmp_path / "kv-key.json").is_file()
    again: list[int] = []
    store = keep_in(tmp_path)
    store.fill(ALL, BUCKETS, ASSIGNED, 2, counted(again), lambda _: None)
    assert len(again) == 2
    check_contents(store)


def test_the_disk_is_taken_before_it_is_written(tmp_path, monkeypatch):
    keep_in(tmp_path).fill(ALL[:1], BUCKETS, ASSIGNED, 2, counted([]), lambda _: None)
    assert (tmp_path / "kv-key.bin").stat().st_blocks * 512 >= NEEDED

    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    for budget in (KEEP, KVCacheConfig(memory_gb=0, disk_gb=1)):
        with pytest.raises(CheckpointError, match=r"GB of KV: No space left on device"):
            open_store(MODEL, ROWS, "float32", budget, tmp_path, "other")


def test_runs_fill_what_they_need(tmp_path):
    first: list[int] = []
    keep_in(tmp_path).fill(np.array([0, 3]), BUCKETS, ASSIGNED, 1, counted(first), lambda _: None)
    assert len(first) == 2
    rest: list[int] = []
    store = keep_in(tmp_path)
    store.fill(ALL, BUCKETS, ASSIGNED, 1, counted(rest), lambda _: None)
    assert len(rest) == 2
    check_contents(store)


def test_rows_that_other_processes_lack_are_computed_again(tmp_path):
    keep_in(tmp_path).fill(ALL, BUCKETS, ASSIGNED, 2, counted([]), lambda _: None)
    store = keep_in(tmp_path)
    assert store.filled.tolist() == [True] * 4
    store.forget(np.array([False, True, False, False]))
    assert store.filled.tolist() == [True, False, True, True]
    again: list[int] = []
    store.fill(ALL, BUCKETS, ASSIGNED, 1, counted(again), lambda _: None)
    assert again == [1]
    check_contents(store)


def test_two_runs_do_not_fill_one_file(tmp_path):
    first = keep_in(tmp_path)
    with pytest.raises(CheckpointError, match=r"kv-key\.bin: another run fills it"):
        keep_in(tmp_path)
    first.fill(ALL, BUCKETS, ASSIGNED, 2, counted([]), lambda _: None)
    again = keep_in(tmp_path)
    again.fill(ALL, BUCKETS, ASSIGNED, 2, counted([]), lambda _: None)
    check_contents(again)


def test_key_changes_with_what_decides_the_bits():
    key = store_key("base", "float32", ROWS, BUCKETS, 2)
    assert key == store_key("base", "float32", list(ROWS), BUCKETS, 2)
    others = [
        store_key("other", "float32", ROWS, BUCKETS, 2),
        store_key("base", "bfloat16", ROWS, BUCKETS, 2),
        store_key("base", "float32", ROWS[::-1], BUCKETS, 2),
        store_key("base", "float32", ROWS, BUCKETS, 1),
        store_key("base", "float32", ROWS, [Bucket(64, 8, 8, 64)], 2),
    ]
    assert len({key, *others}) == 6


def test_keeping_needs_a_folder(base, data, tmp_path):
    with pytest.raises(ConfigError, match=r"kv_cache\.keep needs kv_cache\.folder"):
        train_config(base, data, tmp_path / "run", kv_cache=KVCacheConfig(keep=True))


def test_runs_with_other_tails_share_a_file(base, data, tmp_path):
    kept = KVCacheConfig(disk_gb=1, folder=str(tmp_path / "kv"), keep=True)
    for tail in (1, 2):
        anew = train_config(
            base, data, tmp_path / f"anew{tail}", tail=tail, kv_cache=KVCacheConfig(memory_gb=0)
        )
        train(anew, Reporter(active=False))
        config = train_config(base, data, tmp_path / f"kept{tail}", tail=tail, kv_cache=kept)
        train(config, Reporter(active=False))
        np.testing.assert_allclose(
            losses(tmp_path / f"kept{tail}"), losses(tmp_path / f"anew{tail}"), rtol=1e-5
        )
    assert len(list((tmp_path / "kv").glob("*.bin"))) == 1
