"""Makes the training runs of a study and evaluates them, one after the other, each once.

A result file is written when a run is trained and evaluated, and never again: a study that was
stopped goes on where it was, within a training run too.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pshare_jax.bench import machine
from pshare_jax.convert.files import replace_file
from pshare_jax.convert.manifest import read_json
from pshare_jax.errors import DataError
from pshare_jax.evals.items import Item, read_items
from pshare_jax.study.config import Run, Runs, StudyConfig, expand
from pshare_jax.study.tasks import SUMMARY_FILE, make_task
from pshare_jax.train.config import KVCacheConfig
from pshare_jax.train.output import MODULE_FOLDER, RECORD_FILE
from pshare_jax.train.report import Reporter

BASE_NAME = "base"


class Study:
    """A study and where its files are.

    Args:
        config: what to run.
        reporter: shows progress.
    """

    def __init__(self, config: StudyConfig, reporter: Reporter):
        self._config = config
        self._reporter = reporter
        self._folder = Path(config.folder)
        self._results = Path(config.results)

    def make(self) -> None:
        """Makes all that is missing.

        Raises:
            DataError, ConfigError, CheckpointError: what cannot be used.
        """
        self._make_tasks()
        for runs in self._config.runs:
            self._evaluate_base(runs.task)
            best = None if runs.learning_rates else self.best_rate(runs)
            for run in expand(runs, best):
                self._make(run)
            if not self._is_needed_later(runs):
                shutil.rmtree(self._kv_folder(runs.task), ignore_errors=True)

    def best_rate(self, runs: Runs) -> float | None:
        """The learning rate with the best accuracy on the validation set, among runs of the same
        task, method and tail with one seed and the fewest examples; None without any."""
        found = [
            result
            for path in sorted(self._results.glob(f"{runs.task}-{runs.method}-*.json"))
            if (result := read_json(path))["tail"] == runs.tail or runs.tail > 1
        ]
        if not found:
            return None
        fewest = min(result["examples"] for result in found)
        sweep = [r for r in found if r["examples"] == fewest and r["tail"] == 1]
        return max(sweep, key=lambda r: r["evaluations"]["validation"]["accuracy"])["learning_rate"]

    def _is_needed_later(self, runs: Runs) -> bool:
        """Whether other runs on the same task come after `runs`."""
        following = self._config.runs[self._config.runs.index(runs) + 1 :]
        return any(later.task == runs.task for later in following)

    def _kv_folder(self, task: str) -> Path:
        return self._folder / "kv" / task

    def _make_tasks(self) -> None:
        summary_path = self._results / SUMMARY_FILE
        summary = read_json(summary_path) if summary_path.is_file() else {}
        for task in self._config.tasks:
            folder = self._folder / "data" / task.name
            if (folder / "test.jsonl").is_file() and task.name in summary:
                continue
            self._reporter.say(f"{task.name}: making its items")
            made = make_task(task.name, (task.train, task.validation, task.test), folder)
            if summary.setdefault(task.name, made) != made:
                raise DataError(
                    f"{folder}: the items are not those of {summary_path}; results of both cannot "
                    "be compared: remove the results, or install the packages they were made with"
                )
        _write_json(summary_path, summary)

    def _evaluate_base(self, task: str) -> None:
        path = self._results / f"{task}-{BASE_NAME}.json"
        if not path.is_file():
            facts = {"task": task, "method": BASE_NAME}
            evaluations = {"test": self._evaluate(task, None, "test", None, 1)}
            _write_json(path, {**facts, "evaluations": evaluations})

    def _make(self, run: Run) -> None:
        path = self._results / f"{run.name}.json"
        if path.is_file():
            return
        runs = run.runs
        folder = self._folder / "models" / run.name
        record = self._train(run, folder)
        module = folder / MODULE_FOLDER
        # An ordinary fine-tune reads the prompt itself.
        own_share = 0.0 if runs.method == "full" else None
        served_share = own_share if own_share is not None or runs.tail > 1 else 1.0
        evaluations = {
            "validation": self._evaluate(runs.task, module, "validation", own_share, runs.tail)
        }
        if runs.test:
            evaluations["test"] = self._evaluate(runs.task, module, "test", own_share, runs.tail)
        for share in map(float, runs.shares):
            if share == served_share and "test" in evaluations:
                evaluations[f"test, share {share}"] = evaluations["test"]
                continue
            evaluations[f"test, share {share}"] = self._evaluate(
                runs.task, module, "test", share, runs.tail
            )
        result = {
            "task": runs.task,
            "method": runs.method,
            "learning_rate": run.learning_rate,
            "examples": runs.examples,
            "seed": run.seed,
            "tail": runs.tail,
            "machine": machine.describe(),
            "training": {
                "data": record["data"],
                "steps": record["steps"],
                "train_loss": record["train_loss"],
                "step_seconds": record["step_seconds"],
                "kv_batch_seconds": record["kv_batch_seconds"],
                "packages": record["packages"],
            },
            "evaluations": evaluations,
        }
        _write_json(path, result)
        if not runs.keep:
            shutil.rmtree(folder)

    def _train(self, run: Run, folder: Path) -> dict[str, Any]:
        """Trains in a process of its own, which gives back all its memory; gives the record."""
        record = folder / MODULE_FOLDER / RECORD_FILE
        if not record.is_file():
            self._reporter.say(f"{run.name}: training")
            command = [sys.executable, "-m", "pshare_jax.train", *self._flags(run, folder)]
            if subprocess.run(command, check=False).returncode:
                raise DataError(f"{run.name}: training ended with an error; see the message above")
        return read_json(record)

    def _flags(self, run: Run, folder: Path) -> list[str]:
        config, runs = self._config, run.runs
        data = self._folder / "data" / runs.task / "train.jsonl"
        flags = {
            "base": config.base,
            "output": folder,
            "mode": "full" if runs.method == "full" else "cache-conditioned",
            "dtype": config.dtype,
            "tail": runs.tail,
            "seed": run.seed,
            "data.train": f"[{data}]",
            "data.max_length": config.max_length,
            "lora.rank": config.lora_rank if runs.method == "lora" else 0,
            "optimizer.learning_rate": run.learning_rate,
            "optimizer.batch_size": config.batch_size,
            "optimizer.max_steps": runs.examples // config.batch_size,
            # A run uses each example once; other runs use the same.
            "kv_cache.memory_gb": 0,
            "kv_cache.disk_gb": config.kv_cache_gb,
            "kv_cache.folder": self._kv_folder(runs.task),
            "kv_cache.keep": "true" if config.kv_cache_gb else "false",
            "checkpoint.every": 100,
            "checkpoint.keep": 1,
            "report.tensorboard": "false",
        }
        return [f"--{key}={value}" for key, value in flags.items()]

    def _evaluate(
        self, task: str, module: Path | None, split: str, share: float | None, tail: int
    ) -> dict[str, Any]:
        """A JSON object; which items were right is kept as a string of 0s and 1s."""
        # Imported late: JAX is not needed when all results are there.
        from pshare_jax.evals.intervals import bootstrap_interval
        from pshare_jax.study.evaluate import Evaluator, cover_all_but, cover_share

        items = self._items(task, split)
        title = f"{module.parent.name if module else BASE_NAME}: {split}"
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
        evaluator = Evaluator(self._config.base, module, self._config.eval_batch_size, kv_cache)
        answers = evaluator.answer(
            items,
            cover_all_but(tail) if share is None else cover_share(share),
            self._config.task(task).max_tokens,
            report,
        )
        self._reporter.stop()
        accuracy = sum(answers.correct) / len(items)
        self._reporter.say(f"{title}, share {share}: {accuracy:.3f}")
        return {
            "accuracy": accuracy,
            "interval": bootstrap_interval(answers.correct),
            "correct": "".join(str(int(right)) for right in answers.correct),
            "first_answers": answers.texts[:5],
            "seconds": round(time.perf_counter() - start, 1),
        }

    def _items(self, task: str, split: str) -> list[Item]:
        return read_items(self._folder / "data" / task / f"{split}.jsonl")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    replace_file(path, json.dumps(value, indent=1) + "\n")
