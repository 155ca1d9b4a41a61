"""A base, a data set, and one finished run, shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.train.loop import train
from pshare_jax.train.report import Reporter
from tests.train.helpers import chats, train_config, write_base, write_jsonl


class Run(NamedTuple):
    folder: Path
    record: dict[str, Any]


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tokenizer(base) -> Tokenizer:
    return Tokenizer.load(base / "tokenizer")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    """40 conversations, some of them with several turns."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    return write_jsonl(path, chats(28, seed=1) + chats(12, seed=2, turns=2))


@pytest.fixture(scope="session")
def held_out(tmp_path_factory) -> str:
    return write_jsonl(tmp_path_factory.mktemp("held-out") / "eval.jsonl", chats(10, seed=3))


@pytest.fixture(scope="session")
def plain_run(base, data, held_out, tmp_path_factory) -> Run:
    """An uninterrupted run: two epochs of five steps, evaluated twice an epoch."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    config = train_config(
        base,
        data,
        folder,
        tail=2,
        data={"eval": [held_out]},
        optimizer={"epochs": 2},
        report={"eval_every": 3},
    )
    return Run(folder, train(config, Reporter(active=False)))


@pytest.fixture(scope="session")
def ordinary_run(base, data, held_out, tmp_path_factory):
    """An ordinary fine-tune."""
    folder = tmp_path_factory.mktemp("ordinary") / "run"
    config = train_config(
        base,
        data,
        folder,
        mode="full",
        tail=2,
        data={"eval": [held_out]},
        optimizer={"epochs": 2},
    )
    train(config, Reporter(active=False))
    return folder
