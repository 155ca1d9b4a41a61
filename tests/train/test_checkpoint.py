"""Checkpoints: which are kept, and what happens to those that are damaged or do not fit."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.errors import CheckpointError
from pshare_jax.train.checkpoint import Checkpoints, TrainState


def state(step: int, size: int = 1000) -> TrainState:
    rng = np.random.default_rng(step)
    weights = {"a": jnp.asarray(rng.standard_normal(size), jnp.float32)}
    return TrainState(weights, {"count": jnp.int32(step), "mu": weights})


class Folder:
    """A folder of checkpoints that notes the warnings."""

    def __init__(self, path: Path, keep: int = 2):
        self.path = path / "checkpoints"
        self.warnings: list[str] = []
        self._keep = keep
        self.open()

    def open(self) -> Checkpoints:
        self.checkpoints = Checkpoints(self.path, self._keep, self.warnings.append)
        return self.checkpoints

    def save(self, *steps: int, **eval_losses: float) -> None:
        for step in steps:
            self.checkpoints.save(step, state(step), eval_losses.get(f"at_{step}"))
        self.checkpoints.settle()

    @property
    def steps(self) -> list[int]:
        return sorted(int(path.name) for path in self.path.iterdir() if path.name.isdigit())


@pytest.fixture
def folder(tmp_path):
    folder = Folder(tmp_path)
    yield folder
    folder.checkpoints.close()


def assert_state(restored, step: int) -> None:
    assert restored is not None
    assert restored.step == step
    expected = state(step)
    assert np.array_equal(restored.state.trainable["a"], expected.trainable["a"])
    assert np.array_equal(restored.state.optimizer["mu"]["a"], expected.trainable["a"])
    assert int(restored.state.optimizer["count"]) == step


def test_an_empty_folder_restores_nothing(folder):
    assert folder.checkpoints.restore(state(0)) is None
    assert folder.checkpoints.best_loss() is None
    assert folder.checkpoints.restore_best(state(0)) is None


def test_the_newest_and_the_best_are_kept(folder):
    folder.save(1, 2, 3, 4, 5, at_1=3.0, at_2=1.0, at_4=2.0)
    assert folder.steps == [2, 4, 5]
    assert folder.checkpoints.best_loss() == 1.0
    folder.checkpoints.close()
    reopened = folder.open()
    assert_state(reopened.restore(state(0)), 5)
    best = reopened.restore_best(state(0))
    assert_state(best, 2)
    assert best.eval_loss == 1.0
    # The best of an earlier process stays, however old, until a better one is there.
    folder.save(6, 7, at_6=1.5)
    assert folder.steps == [2, 6, 7]
    folder.save(8, at_8=0.5)
    assert folder.steps == [7, 8]
    assert folder.warnings == []


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_checkpoint_is_told_of_and_the_older_one_used(folder, damage):
    folder.save(1, 2)
    folder.checkpoints.close()
    damage(largest_file(folder.path / "2" / "state"))
    checkpoints = folder.open()
    assert_state(checkpoints.restore(state(0)), 1)
    (warning,) = folder.warnings
    assert f"{folder.path / '2'}: the checkpoint is damaged" in warning
    assert "\n" not in warning
    assert (folder.path.parent / "damaged" / "2").is_dir()
    # The step can be written again.
    folder.save(2)
    assert_state(checkpoints.restore(state(0)), 2)


def test_a_damaged_older_checkpoint_is_not_the_best(folder):
    folder.save(1, 2, at_1=1.0, at_2=2.0)
    folder.checkpoints.close()
    truncate(folder.path / "1/about/metadata")
    checkpoints = folder.open()
    assert checkpoints.best_loss() == 2.0
    (warning,) = folder.warnings
    assert f"{folder.path / '1'}: the checkpoint is damaged" in warning
    assert_state(checkpoints.restore_best(state(0)), 2)
    assert (folder.path.parent / "damaged" / "1").is_dir()
    assert folder.steps == [2]


@pytest.mark.parametrize("part", ["state/manifest.ocdbt", "about/metadata"])
def test_only_damaged_checkpoints_are_an_error(folder, part):
    folder.save(1)
    folder.checkpoints.close()
    truncate(folder.path / "1" / part)
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints can be used"):
        folder.open().restore(state(0))


def check_that_only_step_2_is_lost(folder: Folder, reason: str) -> None:
    (warning,) = folder.warnings
    assert "the checkpoint of step 2 could not be written: " in warning
    assert reason in warning
    assert warning.endswith("; the one of step 1 stays the newest")
    assert folder.checkpoints.newest() == 1
    assert folder.steps == [1]
    assert_state(folder.checkpoints.restore(state(0)), 1)
    folder.save(3)
    assert_state(folder.checkpoints.restore(state(0)), 3)


def test_a_full_disk_costs_one_checkpoint_only(folder, monkeypatch):
    folder.save(1, at_1=2.0)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(folder.path)._replace(free=5000)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        folder.save(2, at_2=1.0)
    # What was better is lost: a later one need only beat what is stored.
    assert folder.checkpoints.best_loss() == 2.0
    check_that_only_step_2_is_lost(folder, "no disk space")


def lose_a_write(path: Path) -> None:
    """Saves three checkpoints; the files of the second grow beyond what is allowed."""
    folder = Folder(path)
    folder.save(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    folder.checkpoints.save(2, state(2, size=100_000), None)
    folder.checkpoints.settle()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_that_only_step_2_is_lost(folder, "File too large")
    folder.checkpoints.close()


def test_a_failing_write_costs_one_checkpoint_only(tmp_path):
    # In a process of its own: orbax abandons the writes that it has started at the same time.
    script = (
        "from pathlib import Path; from tests.train.test_checkpoint import lose_a_write;"
        f"lose_a_write(Path({str(tmp_path)!r}))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
