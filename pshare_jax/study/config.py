"""What the study trains and evaluates. Nothing here imports JAX."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pshare_jax.core.split_rule import INVOCATION, TailSetting
from pshare_jax.errors import ConfigError, DataError
from pshare_jax.study.relay import ROLES, task_of

Method = Literal["full", "ordinary-lora", "prefillshare", "lora", "alora"]
"""Ordinary fine-tuning of all weights, or of LoRA factors; cache-conditioned fine-tuning of all
weights, or of LoRA factors; activated LoRA: factors that act from the answer's opening on."""
ORDINARY = ("full", "ordinary-lora")
"""Methods that read a prompt with KV of their own; with the base's they are naive sharing."""
_LORA = ("ordinary-lora", "lora", "alora")
Tail = int | Literal["last-message"]
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of a prompt that are read from the base's KV, as in the paper's Figure 2."""
MARGIN = 0.02
AS_SERVED = "test, as served"
"""Names the evaluation in which the server's engine answers the test set."""


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
class Evaluation:
    """One way to answer the items of a set.

    Args:
        split: the set.
        share: of a prompt that is read from the base's KV; None is all but the tail, as a module
            that was trained on the base's KV is served.
        layers: first and end of those in which the module computes its own KV of what is read from
            the base's in all others, from the base's hidden states before them.
        served: whether the server's engine answers.
    """

    split: str
    share: float | None
    layers: tuple[int, int] | None = None
    served: bool = False


@dataclass(frozen=True)
class Runs:
    """Training runs that differ in learning rate and seed.

    Args:
        task: name of the task.
        method: how to train.
        examples: training examples, each used once: a multiple of the batch size.
        learning_rates: one run for each. Empty: the one that was best on the validation set among
            the finished runs of this task and method with a tail of 1 and the fewest examples.
        seeds: one run for each.
        tail: the split rule's: a number of tokens, or `last-message`.
        test: whether to evaluate on the test set.
        validation: whether to evaluate on the validation set; not needed where nothing is chosen
            by it.
        shares: evaluate on the test set also with these shares, 0 to 1, of the prompt read from
            the base's KV; `SHARES` for a plot.
        recompute: evaluate on the validation and the test set also with the base's KV in all layers
            but these (first, end), in which an ordinary fine-tune computes its own.
        keep: whether the decode module is kept once it is evaluated.
    """

    task: str
    method: Method
    examples: int
    learning_rates: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    tail: Tail = 1
    test: bool = False
    validation: bool = True
    shares: list[float] = field(default_factory=list)
    recompute: list[tuple[int, int]] = field(default_factory=list)
    keep: bool = False

    def __post_init__(self) -> None:
        if any(not 0 <= share <= 1 for share in self.shares):
            raise ConfigError(f"runs: shares must be from 0 to 1, got {self.shares}")
        if self.recompute and self.method not in ORDINARY:
            raise ConfigError(f"runs: recompute is for {' and '.join(ORDINARY)}, not {self.method}")
        if any(not 0 <= first < end for first, end in self.recompute):
            raise ConfigError(f"runs: recompute must be pairs first < end, got {self.recompute}")
        if not self.validation and (not self.test or self.recompute):
            raise ConfigError(
                f"runs: {self.task}, {self.method}: validation may be false only beside test: true "
                "and without recompute, whose layers are chosen on the validation set"
            )

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """What is evaluated, by name."""
        # An ordinary fine-tune reads the prompt itself.
        share = 0.0 if self.method in ORDINARY else None
        named = {"validation": Evaluation("validation", share)} if self.validation else {}
        if self.test:
            named["test"] = Evaluation("test", share)
        for other in map(float, self.shares):
            named[f"test, share {other}"] = Evaluation("test", other)
        for first, end in self.recompute:
            for split in ("validation", "test"):
                named[f"{split}, layers {first}-{end}"] = Evaluation(split, None, (first, end))
        return named


TEAM_TASK = "relay"
SHARED, ISOLATED, NAIVE = "shared", "isolated", "naive"


@dataclass(frozen=True)
class Team:
    """A module for each role, trained alike.

    Args:
        method: how to train each.
        examples: training examples of each.
        learning_rate: of each.
        seeds: one team for each.
        tail: the split rule's.
    """

    method: Method
    examples: int
    learning_rate: float
    seeds: list[int] = field(default_factory=lambda: [0])
    tail: Tail = 1

    def runs(self, seed: int) -> list[Runs]:
        """The training runs of one team, in the order of the roles."""
        return [
            Runs(
                task_of(role),
                self.method,
                self.examples,
                [self.learning_rate],
                [seed],
                self.tail,
                test=True,
                keep=True,
            )
            for role in ROLES
        ]

    def name(self, seed: int) -> str:
        """Names its result."""
        tail = f"-{tail_name(self.tail, '')}" if self.tail != 1 else ""
        rate = f"{self.learning_rate:g}"
        return f"{TEAM_TASK}-{self.method}{tail}-{rate}-{self.examples}-{seed}"

    @property
    def modes(self) -> dict[str, float | None]:
        """Ways in which the team reads the context: the share of it that comes from the base's KV;
        None is all but the tail."""
        if self.method in ORDINARY:
            return {ISOLATED: 0.0, NAIVE: 1.0}
        return {SHARED: None}


@dataclass(frozen=True)
class StudyConfig:
    """The study.

    Args:
        base: the prefill checkpoint.
        folder: data, training runs and decode modules; can be removed when all is done.
        results: one JSON file a training run and its evaluations; what a report is made from.
        tasks: the tasks.
        runs: the training runs, in the order in which they are made.
        teams: teams of modules for the task `relay`, after all runs.
        document: Markdown file of which a report replaces a section; empty: it is printed.
        section: name of that section.
        dtype: of activations and KV in training, and as served; other evaluations are in float32.
        batch_size: examples a step.
        lora_rank: rank of LoRA runs.
        invocation: the token ids that activated LoRA is invoked by: those with which the base's
            chat template opens an answer.
        plain_text: whether questions are plain texts, for a base without a chat template.
        margin: a method is called not inferior to full fine-tuning if it is right on at most so
            much less of the test items (0 to 1): the 95 % interval of the difference lies above it.
            0: nothing is called so, while full fine-tuning is not tuned on this base.
        kv_cache_gb: largest size (10^9 bytes) of the base's KV of a task's training set that is
            kept in `folder` for all runs on it; a larger one is computed anew in each run.
        max_length: most tokens of an example.
        eval_batch_size: prompts that are answered together.
        as_served: whether the server's engine answers the test sets too, in `dtype`, of runs that
            are made from then on.

    Raises:
        ConfigError: a run of no task, or of a part of a step.
    """

    base: str
    folder: str
    results: str
    tasks: list[TaskConfig]
    runs: list[Runs]
    teams: list[Team] = field(default_factory=list)
    document: str = ""
    section: str = "study"
    # Not `auto`: it would differ between the machines on which a study's runs are made.
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 16
    lora_rank: int = 8
    invocation: list[int] = field(default_factory=list)
    plain_text: bool = False
    margin: float = MARGIN
    kv_cache_gb: float = 0.0
    max_length: int = 1024
    eval_batch_size: int = 32
    as_served: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; it must be at least 1")
        members = [runs for team in self.teams for runs in team.runs(0)]
        for runs in [*self.runs, *members]:
            self.task(runs.task)
            if runs.method == "alora" and not self.invocation:
                raise ConfigError("invocation: alora needs the token ids that it is invoked by")
            if runs.examples < 1 or runs.examples % self.batch_size:
                raise ConfigError(
                    f"runs: {runs.task}, {runs.method}: examples is {runs.examples}; it must be a "
                    f"multiple of batch_size, {self.batch_size}: a run is made of whole steps"
                )

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
        tail = f"-{tail_name(runs.tail, '')}" if runs.tail != 1 else ""
        return f"{runs.task}-{runs.method}{tail}-{self.learning_rate:g}-{runs.examples}-{self.seed}"

    def training(self, config: StudyConfig) -> dict[str, Any]:
        """What decides the trained weights besides base and data: keys of the trainer."""
        runs = self.runs
        return {
            "mode": "full" if runs.method in ORDINARY else "cache-conditioned",
            "dtype": config.dtype,
            "tail": trained_tail(runs, config),
            "seed": self.seed,
            "data.max_length": config.max_length,
            "lora.rank": config.lora_rank if runs.method in _LORA else 0,
            "optimizer.learning_rate": self.learning_rate,
            "optimizer.batch_size": config.batch_size,
            "optimizer.max_steps": runs.examples // config.batch_size,
        }

    def settings(self, config: StudyConfig, base: str) -> dict[str, Any]:
        """What decides the result besides the data; kept with it.

        Args:
            config: the study.
            base: fingerprint of its base.
        """
        max_tokens = config.task(self.runs.task).max_tokens
        return {"base": base, **self.training(config), "max_tokens": max_tokens}


def tail_name(tail: Tail, space: str = " ") -> str:
    """A tail in words."""
    return tail if isinstance(tail, str) else f"tail{space}{tail}"


def trained_tail(runs: Runs, config: StudyConfig) -> TailSetting:
    """The trainer's `tail` of `runs`."""
    return {INVOCATION: config.invocation} if runs.method == "alora" else runs.tail


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
            "this task and method with a tail of 1 tells which is best"
        )
    for rate, seed in itertools.product(rates, runs.seeds):
        yield Run(runs, rate, seed)


def check_result(
    path: Path, result: Mapping[str, Any], settings: Mapping[str, Any], evaluations: Iterable[str]
) -> None:
    """Checks that a result is what the configuration asks for now.

    Args:
        path: its file.
        result: what is in it.
        settings: what must have decided it, see `Run.settings`.
        evaluations: names of those that it must have.

    Raises:
        DataError: names the file, and the setting or evaluation.
    """
    found = result.get("settings", {})
    for key, value in settings.items():
        if found.get(key) != value:
            raise DataError(
                f"{path}: was made with {key} {found.get(key)!r}, but the configuration says "
                f"{value!r}; remove it to have it made again, or name another folder and results"
            )
    for name in evaluations:
        if name not in result["evaluations"]:
            raise DataError(f"{path}: has no evaluation {name!r}; remove it to have it made again")
