"""A byte of a checkpoint's tensors that has changed is found, whichever it is."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pshare_jax.convert.orbax import load_weights
from pshare_jax.convert.seals import open_checkpoint
from pshare_jax.errors import CheckpointError
from tests.attack.bounds import SEEDS
from tests.attack.test_damaged_checkpoints import saved  # noqa: F401 (fixture)

BYTES = 40


def is_refused(folder) -> bool:
    try:
        weights = load_weights(open_checkpoint(folder))
        for value in weights.values():
            np.asarray(value)
    except CheckpointError:
        return True
    return False


def test_every_byte_of_the_smallest_tensor(saved):  # noqa: F811
    folder = saved / "lora"
    path = min(folder.rglob("c/**/*"), key=lambda path: (path.is_dir(), path.stat().st_size))
    whole = path.read_bytes()
    try:
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
            assert is_refused(folder), (path, at)
    finally:
        path.write_bytes(whole)
    assert not is_refused(folder)


@pytest.mark.parametrize("seed", SEEDS)
def test_any_bit_of_any_tensor(saved, seed):  # noqa: F811
    rng = random.Random(f"bits {seed}")
    folder = saved / "base"
    paths = sorted(path for path in folder.rglob("c/**/*") if path.is_file())
    for _ in range(BYTES):
        path = rng.choice(paths)
        whole = path.read_bytes()
        at, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        try:
            assert is_refused(folder), (path, at, bit)
        finally:
            path.write_bytes(whole)
