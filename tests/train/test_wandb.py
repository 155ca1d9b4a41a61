"""Weights & Biases gets the figures, and cannot stop a run."""

from __future__ import annotations

import sys
import types

import pytest

from pshare_jax.errors import MissingExtraError
from pshare_jax.train.config import ReportConfig
from pshare_jax.train.report import MetricsLog
from pshare_jax.train.wandb_log import WandbLog


class FakeRun:
    def __init__(self, fail_at: int | None = None):
        self.logged: list[tuple[int, dict]] = []
        self.finished = False
        self._fail_at = fail_at

    def log(self, values: dict, step: int) -> None:
        if step == self._fail_at:
            raise ConnectionError("no network")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fake(monkeypatch):
    """The package as far as it is used: `init` gives a run."""
    package = types.ModuleType("wandb")
    package.run = FakeRun()
    package.calls = []

    def init(**fields):
        package.calls.append(fields)
        return package.run

    package.init = init
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


def test_a_run_that_goes_on_is_the_same_run_there(fake, tmp_path):
    for start in (1, 2):
        config = ReportConfig(wandb="project", tensorboard=False)
        log = MetricsLog(tmp_path, start, config, pytest.fail, {"base": "b"})
        log.write(start, {"loss": 0.5, "rate": float("nan")})
        log.close()
    assert fake.run.logged == [(1, {"loss": 0.5}), (2, {"loss": 0.5})]
    assert fake.run.finished
    first, second = fake.calls
    assert first == second
    assert (first["project"], first["resume"]) == ("project", "allow")
    assert first["config"] == {"base": "b"}


def test_a_failure_is_told_once_and_training_goes_on(fake, tmp_path):
    warnings: list[str] = []
    fake.run = FakeRun(fail_at=2)
    log = WandbLog("project", tmp_path, {}, warnings.append)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0})
    log.close()
    assert warnings == ["report.wandb: no network; training goes on without it"]
    assert fake.run.logged == [(1, {"loss": 1.0})]


def test_without_the_package_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pshare_jax\[wandb\]'"):
        WandbLog("project", tmp_path, {}, pytest.fail)
