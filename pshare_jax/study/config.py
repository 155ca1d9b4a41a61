"""What the study trains and evaluates. Nothing here imports JAX."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from pshare_jax.config import DType
from pshare_jax.errors import ConfigError

Method = Literal["full", "prefillshare", "lora"]
"""Ordinary full fine-tuning; cache-conditioned fine-tuning of all weights, or of LoRA factors."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of a prompt that are read from the base's KV, as in the paper's Figure 2."""


@dataclass(frozen=True)
class TaskConfig:
    """A task of the study.

    Args:
        name: see `tasks.TASKS`.
        train: training items.
        validation: items that settings are chosen on.
        test: items that results are reported on.
        max_tokens: most tokens of an answer.
    """

    name: str
    train: int
    validation: int
    test: int
    max_tokens: int


@dataclass(frozen=True)
class Runs:
    """Training runs that differ in learning rate and seed.

    Args:
        task: name of the task.
        method: how to train.
        examples: training examples, each used once.
        learning_rates: one run for each. Empty: the one that was best on the validation set among
            the finished runs of this task and method.
        seeds: one run for each.
        tail: the split rule's.
        test: whether to evaluate on the test set besides the validation set.
        shares: evaluate on the test set also with these shares, 0 to 1, of the prompt read from
            the base's KV; `SHARES` for a plot.
        keep: whether the decode module is kept once it is evaluated.
    """

    task: str
    method: Method
    examples: int
    learning_rates: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    tail: int = 1
    test: bool = False
    shares: list[float] = field(default_factory=list)
    keep: bool = False

    def __post_init__(self) -> None:
        if any(not 0 <= share <= 1 for share in self.shares):
            raise ConfigError(f"runs: shares must be from 0 to 1, got {self.shares}")


@dataclass(frozen=True)
class StudyConfig:
    """The study.

    Args:
        base: the prefill checkpoint.
        folder: data, training runs and decode modules; can be removed when all is done.
        results: one JSON file a training run and its evaluations; what a report is made from.
        tasks: the tasks.
        runs: the training runs, in the order in which they are made.
        dtype: of activations and KV in training; evaluations are in float32.
        batch_size: examples a step.
        lora_rank: rank of LoRA runs.
        kv_cache_gb: largest size (10^9 bytes) of the base's KV of a task's training set that is
            kept in `folder` for all runs on it; a larger one is computed anew in each run.
        max_length: most tokens of an example.
        eval_batch_size: prompts that are answered together.
    """

    base: str
    folder: str
    results: str
    tasks: list[TaskConfig]
    runs: list[Runs]
    dtype: DType = "float32"
    batch_size: int = 16
    lora_rank: int = 8
    kv_cache_gb: float = 0.0
    max_length: int = 1024
    eval_batch_size: int = 32

    def task(self, name: str) -> TaskConfig:
        """The task of that name.

        Raises:
            ConfigError: there is none.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        raise ConfigError(f"runs: there is no task {name!r} in tasks")


@dataclass(frozen=True)
class Run:
    """One training run: `runs` with a learning rate and a seed chosen."""

    runs: Runs
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Names its files."""
        runs = self.runs
        tail = f"-tail{runs.tail}" if runs.tail > 1 else ""
        return f"{runs.task}-{runs.method}{tail}-{self.learning_rate:g}-{runs.examples}-{self.seed}"


def expand(runs: Runs, best: float | None) -> Iterator[Run]:
    """The runs that `runs` describes.

    Args:
        runs: see `Runs`.
        best: the learning rate where `runs` names none.

    Raises:
        ConfigError: one is needed, and there is none.
    """
    rates = runs.learning_rates or ([] if best is None else [best])
    if not rates:
        raise ConfigError(
            f"runs: {runs.task}, {runs.method}: learning_rates is empty, and no earlier run of "
            "this task and method tells which is best"
        )
    for rate, seed in itertools.product(rates, runs.seeds):
        yield Run(runs, rate, seed)
