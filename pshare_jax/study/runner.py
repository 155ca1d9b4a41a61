"""Makes the training runs of a study and evaluates them, one after the other, each once.

A result file is written when a run is trained and evaluated, and never again: a study that was
stopped goes on where it was, within a training run too. One that was made with other settings than
the configuration's is an error here: it would stand in a table for what it is not.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pshare_jax.bench import machine
from pshare_jax.convert.files import replace_file
from pshare_jax.convert.manifest import Manifest, read_json, read_manifest
from pshare_jax.core.split_rule import TailSetting
from pshare_jax.errors import DataError
from pshare_jax.evals.items import Item, read_items
from pshare_jax.study.config import (
    AS_SERVED,
    ORDINARY,
    Evaluation,
    Run,
    Runs,
    StudyConfig,
    Team,
    check_result,
    expand,
    trained_tail,
)
from pshare_jax.study.relay import ROLES, task_of
from pshare_jax.study.tasks import SUMMARY_FILE, TOOL_PARSER, make_tasks, write_plain
from pshare_jax.study.teams import play_as_team
from pshare_jax.tied import tied
from pshare_jax.train.config import KVCacheConfig
from pshare_jax.train.output import MODULE_FOLDER, RECORD_FILE
from pshare_jax.train.report import Reporter

BASE_NAME = "base"
_STOPPED = 130
"""The trainer's exit code after a signal."""


class Study:
    """A study and where its files are.

    Args:
        config: what to run.
        reporter: shows progress.
    """

    def __init__(self, config: StudyConfig, reporter: Reporter):
        self._config = config
        self._reporter = reporter
        self._folder = Path(config.folder).expanduser()
        self._results = Path(config.results).expanduser()

    def make(self) -> None:
        """Makes all that is missing.

        Raises:
            DataError, ConfigError, CheckpointError: what cannot be used.
            KeyboardInterrupt: a signal stopped it.
        """
        summary_path = self._results / SUMMARY_FILE
        summary = make_tasks(
            self._config.tasks, self._folder / "data", summary_path, self._reporter.say
        )
        for runs in self._config.runs:
            if runs.examples > (items := summary[runs.task]["train"]["items"]):
                raise DataError(
                    f"runs: {runs.task}, {runs.method}: examples is {runs.examples}, but {items} "
                    "training items are all there are; ask for fewer, or for more items in tasks"
                )
        for runs in self._config.runs:
            self._evaluate_base(runs.task)
            best = None if runs.learning_rates else self.best_rate(runs)
            for run in expand(runs, best):
                self._make(run)
            if not self._is_needed_later(runs):
                shutil.rmtree(self._kv_folder(runs.task), ignore_errors=True)
        for team in self._config.teams:
            for seed in team.seeds:
                self._make_team(team, seed)

    def best_rate(self, runs: Runs) -> float | None:
        """The learning rate with the best accuracy on the validation set, among the runs of the
        same task and method with a tail of 1 and the fewest examples; None without any."""
        found = [
            result
            for path in sorted(self._results.glob(f"{runs.task}-{runs.method}-*.json"))
            if (result := read_json(path))["tail"] == 1 and "validation" in result["evaluations"]
        ]
        if not found:
            return None
        fewest = min(result["examples"] for result in found)
        sweep = [result for result in found if result["examples"] == fewest]
        return max(sweep, key=lambda r: r["evaluations"]["validation"]["accuracy"])["learning_rate"]

    @cached_property
    def _base(self) -> Manifest:
        return read_manifest(self._config.base)

    def _result(self, path: Path) -> dict[str, Any]:
        """What is in a result file, with today's fingerprint of the base."""
        result = read_json(path)
        settings = dict(result.get("settings", {}))
        if "base" in settings:
            settings["base"] = self._base.current(settings["base"])
        return {**result, "settings": settings}

    def _is_needed_later(self, runs: Runs) -> bool:
        """Whether other runs on the same task come after `runs`."""
        following = self._config.runs[self._config.runs.index(runs) + 1 :]
        return any(later.task == runs.task for later in following)

    def _kv_folder(self, task: str) -> Path:
        return self._folder / "kv" / task

    def _evaluate_base(self, task: str) -> None:
        path = self._results / f"{task}-{BASE_NAME}.json"
        settings = {
            "base": self._base.fingerprint,
            "max_tokens": self._config.task(task).max_tokens,
        }
        if path.is_file():
            check_result(path, self._result(path), settings, ["test"])
            return
        facts = {"task": task, "method": BASE_NAME, "settings": settings}
        evaluations = {"test": self._evaluate(task, None, Evaluation("test", None), 1)}
        _write_json(path, {**facts, "evaluations": evaluations})

    def _make(self, run: Run) -> None:
        runs = run.runs
        path = self._results / f"{run.name}.json"
        settings = run.settings(self._config, self._base.fingerprint)
        if path.is_file():
            check_result(path, self._result(path), settings, list(runs.evaluations))
            return
        folder = self._folder / "models" / run.name
        record = self._train(run, folder)
        result = {
            "task": runs.task,
            "method": runs.method,
            "learning_rate": run.learning_rate,
            "examples": runs.examples,
            "seed": run.seed,
            "tail": runs.tail,
            "settings": settings,
            "machine": machine.describe(),
            "training": {
                "data": record["data"],
                "steps": record["steps"],
                "train_loss": record["train_loss"],
                "step_seconds": record["step_seconds"],
                "kv_batch_seconds": record["kv_batch_seconds"],
                "packages": record["packages"],
            },
            "evaluations": self._evaluate_module(runs, folder / MODULE_FOLDER),
        }
        _write_json(path, result)
        if not runs.keep:
            shutil.rmtree(folder)

    def _make_team(self, team: Team, seed: int) -> None:
        """Trains a module for each role, and lets them answer each other."""
        path = self._results / f"{team.name(seed)}.json"
        members = [run for runs in team.runs(seed) for run in expand(runs, None)]
        settings = {
            role: run.settings(self._config, self._base.fingerprint)
            for role, run in zip(ROLES, members, strict=True)
        }
        if path.is_file():
            found = read_json(path).get("settings")
            if found != settings:
                raise DataError(
                    f"{path}: was made with other settings than the configuration's; remove it to "
                    "have it made again, or name another folder and results"
                )
            return
        folders = {}
        for role, run in zip(ROLES, members, strict=True):
            self._evaluate_base(run.runs.task)
            self._make(run)
            folders[role] = self._folder / "models" / run.name / MODULE_FOLDER
            if not folders[role].is_dir():
                raise DataError(f"{folders[role]}: is gone; remove {run.name}.json of the results")
        items = self._items(task_of(ROLES[-1]), "test")
        tail = trained_tail(members[0].runs, self._config)
        modes = {}
        for mode, share in team.modes.items():
            self._reporter.say(f"{team.name(seed)}: {mode}")
            modes[mode] = play_as_team(items, folders, share, tail, self._texts)
        result = {"method": team.method, "examples": team.examples, "seed": seed}
        _write_json(path, {**result, "tail": team.tail, "settings": settings, "modes": modes})

    def _texts(
        self, module: Path, items: Sequence[Item], share: float | None, tail: TailSetting
    ) -> Sequence[str]:
        """A module's answers to items that other modules have had a part in."""
        from pshare_jax.study.evaluate import Evaluator, cover_share

        config = self._config
        evaluator = Evaluator(
            config.base, module, config.eval_batch_size, KVCacheConfig(), config.plain_text
        )
        cover = evaluator.cover_by(tail) if share is None else cover_share(share)
        most = config.task(task_of(ROLES[-1])).max_tokens
        return evaluator.answer(items, cover, most, lambda count: None).texts

    def _evaluate_module(self, runs: Runs, module: Path) -> dict[str, Any]:
        # Nothing is evaluated twice: this share is how the module is served.
        by_tail = runs.method != "alora" and runs.tail == 1
        served_share = 0.0 if runs.method in ORDINARY else 1.0 if by_tail else None
        tail = trained_tail(runs, self._config)
        found: dict[str, Any] = {}
        for name, evaluation in runs.evaluations.items():
            same = evaluation.layers is None and evaluation.share == served_share
            if same and evaluation.split == "test" and "test" in found:
                found[name] = found["test"]
            else:
                found[name] = self._evaluate(runs.task, module, evaluation, tail)
        if self._config.as_served and runs.test:
            served = replace(runs.evaluations["test"], served=True)
            found[AS_SERVED] = self._evaluate(runs.task, module, served, tail)
        return found

    def _train(self, run: Run, folder: Path) -> dict[str, Any]:
        """Trains in a process of its own, which gives back all its memory; gives the record."""
        self._reporter.say(f"{run.name}: training")
        # One that has been trained already only has its configuration and data compared.
        command = [sys.executable, "-m", "pshare_jax.train", *self._flags(run, folder)]
        if run_trainer(command):
            raise DataError(f"{run.name}: training ended with an error; see the message above")
        record = read_json(folder / MODULE_FOLDER / RECORD_FILE)
        steps = run.training(self._config)["optimizer.max_steps"]
        if record["steps"] != steps:
            raise DataError(
                f"{folder}: was trained for {record['steps']} steps, but examples: "
                f"{run.runs.examples} takes {steps}; remove it, and ask for no more examples than "
                "its training set has"
            )
        return record

    def _flags(self, run: Run, folder: Path) -> list[str]:
        config, task = self._config, run.runs.task
        flags = {
            "base": config.base,
            "output": folder,
            # The questions of `tools` show the functions in this form already.
            "data.tool_parser": TOOL_PARSER,
            "data.train": f"[{self._training_items(task)}]",
            **run.training(config),
            # A run uses each example once; other runs use the same.
            "kv_cache.memory_gb": 0,
            "kv_cache.disk_gb": config.kv_cache_gb,
            "kv_cache.folder": self._kv_folder(task),
            "kv_cache.keep": "true" if config.kv_cache_gb else "false",
            "checkpoint.every": 100,
            "checkpoint.keep": 1,
            "report.tensorboard": "false",
        }
        return [f"--{key}={value}" for key, value in flags.items()]

    def _evaluate(
        self, task: str, module: Path | None, evaluation: Evaluation, tail: TailSetting
    ) -> dict[str, Any]:
        """`Answers.as_json`, and the seconds that they took."""
        # Imported late: JAX is not needed when all results are there.
        from pshare_jax.study.evaluate import Evaluator, cover_share

        items = self._items(task, evaluation.split)
        share = evaluation.share
        title = f"{module.parent.name if module else BASE_NAME}: {evaluation.split}"
        self._reporter.start(title, len(items))
        done = 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            self._reporter.advance(title, done, len(items))

        start = time.perf_counter()
        kv_cache = KVCacheConfig(
            memory_gb=0,
            disk_gb=self._config.kv_cache_gb,
            folder=str(self._kv_folder(task)),
            keep=self._config.kv_cache_gb > 0,
        )
        config = self._config
        evaluator = Evaluator(
            config.base, module, config.eval_batch_size, kv_cache, config.plain_text
        )
        max_tokens = config.task(task).max_tokens
        if evaluation.served:
            own_tail = tail if share is None else None
            answers = evaluator.answer_as_served(items, own_tail, max_tokens, config.dtype, report)
        else:
            cover = evaluator.cover_by(tail) if share is None else cover_share(share)
            answers = evaluator.answer(items, cover, max_tokens, report, evaluation.layers)
        self._reporter.stop()
        graded = answers.as_json()
        said = f"layers {evaluation.layers}" if evaluation.layers else f"share {share}"
        said = "as served" if evaluation.served else said
        self._reporter.say(f"{title}, {said}: {graded['accuracy']:.3f}")
        return graded | {"seconds": round(time.perf_counter() - start, 1)}

    def _training_items(self, task: str) -> Path:
        items = self._folder / "data" / task / "train.jsonl"
        if not self._config.plain_text:
            return items
        plain = items.with_name("train-plain.jsonl")
        write_plain(items, plain)
        return plain

    def _items(self, task: str, split: str) -> list[Item]:
        return read_items(self._folder / "data" / task / f"{split}.jsonl")


def run_trainer(command: Sequence[str]) -> int:
    """Runs a trainer to its end and gives its exit code; from the main thread.

    If this process is killed, the trainer is told, saves its checkpoint and ends.

    Raises:
        KeyboardInterrupt: a signal stopped the trainer, or this process: then the trainer is told,
            and has saved its checkpoint.
    """
    trainer = subprocess.Popen(tied(command))
    interrupted = False
    while True:
        try:
            code = trainer.wait()
            break
        except KeyboardInterrupt:
            interrupted = True
            # After Ctrl-C in a terminal the trainer has got SIGINT too. A second SIGINT would end
            # it before it has saved; a first SIGTERM only says the same again.
            trainer.terminate()
    if interrupted or code == _STOPPED:
        raise KeyboardInterrupt
    return code


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    replace_file(path, json.dumps(value, indent=1) + "\n")
