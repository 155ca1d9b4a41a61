"""`bench train`: what a training step takes, in each way to train.

Each way is a short run of the trainer itself on examples that all have the same number of tokens.
Rounds go through all ways in turn, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from pshare_jax.config import DType
from pshare_jax.convert.manifest import TOKENIZER_FOLDER
from pshare_jax.errors import BenchmarkError
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.train import distributed, loop
from pshare_jax.train.config import (
    CheckpointConfig,
    DataConfig,
    KVCacheConfig,
    LoraConfig,
    OptimizerConfig,
    ReportConfig,
    TrainConfig,
)
from pshare_jax.train.config_check import check_config
from pshare_jax.train.report import Reporter

FULL = "full fine-tuning"
_MEMORY_GB = 8.0
_WORD = " a"
"""Repeated it is a text of about one token a repeat; what a token is does not change its cost."""


@dataclass(frozen=True)
class TrainingOptions:
    """What is measured.

    Args:
        base: the prefill checkpoint.
        prompt_words: lengths of the prompts; everything is measured with each.
        completion_words: length of the answers.
        batch_size: examples of a step.
        steps: steps of a run that count; one before them compiles.
        rounds: runs of each way.
        tail: a longer tail that is measured besides 1.
        lora_rank: rank of the LoRA modules.
        dtype: as of the trainer.
        compilation_cache_dir: as of the trainer.
    """

    base: str = "checkpoints/smollm2-135m"
    prompt_words: list[int] = field(default_factory=lambda: [80, 400])
    completion_words: int = 8
    batch_size: int = 8
    steps: int = 5
    rounds: int = 3
    tail: int = 32
    lora_rank: int = 8
    dtype: DType = "auto"
    compilation_cache_dir: str = "~/.cache/pshare_jax/xla"


def run(options: TrainingOptions, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Measures everything; `progress` gets how many runs of how many are done.

    Each run leaves a checkpoint, which is removed: a full module needs 14 bytes of the temporary
    folder a weight.

    Returns:
        The options, and for each length of prompt and each way the seconds a step: the median,
        lowest and highest of the rounds, each the median of a run's steps.

    Raises:
        BenchmarkError: nothing to measure.
        ConfigError, DataError, CheckpointError: something that cannot be used, by name.
    """
    if min(options.steps, options.rounds, len(options.prompt_words)) < 1:
        raise BenchmarkError("steps, rounds and the number of prompt_words must be at least 1")
    ways = _ways(options)
    records: dict[tuple[int, str], list[dict[str, Any]]] = {}
    done, total = 0, options.rounds * len(options.prompt_words) * len(ways)
    tokenizer = Tokenizer.load(Path(options.base).expanduser() / TOKENIZER_FOLDER)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        distributed.start(ways[FULL])
        for _ in range(options.rounds):
            for words in options.prompt_words:
                data = DataConfig([_write_examples(options, folder, words)], max_length=1 << 20)
                for way, config in ways.items():
                    record = _train(replace(config, output=str(folder / "run"), data=data))
                    records.setdefault((words, way), []).append(record)
                    done += 1
                    progress(done, total)
    return {
        "options": asdict(options),
        "steps": [
            {
                "prompt_tokens": len(tokenizer.encode(_WORD * words)),
                "way": way,
                "dtype": rounds[0]["config"]["dtype"],
                "median": statistics.median(record["step_seconds"] for record in rounds),
                "low": min(record["step_seconds"] for record in rounds),
                "high": max(record["step_seconds"] for record in rounds),
            }
            for (words, way), rounds in records.items()
        ],
    }


def _train(config: TrainConfig) -> dict[str, Any]:
    """The record of a run, of which nothing else is left."""
    check_config(config)
    record = loop.train(config, Reporter(active=False))
    shutil.rmtree(config.folder)
    keeps = config.mode != "full" and config.kv_cache.memory_gb > 0
    if keeps and record["kv_batch_seconds"] is None:
        raise BenchmarkError(
            f"the base's KV of a run takes more than {config.kv_cache.memory_gb:g} GB; choose "
            "shorter prompt_words, fewer steps or a smaller batch_size"
        )
    return record


def _ways(options: TrainingOptions) -> dict[str, TrainConfig]:
    """A configuration for each way to train, but for its output and its data."""
    shared = TrainConfig(
        base=options.base,
        output="",
        dtype=options.dtype,
        tail=1,
        compilation_cache_dir=options.compilation_cache_dir,
        optimizer=OptimizerConfig(2e-5, batch_size=options.batch_size, epochs=1),
        kv_cache=KVCacheConfig(memory_gb=_MEMORY_GB),
        checkpoint=CheckpointConfig(every=0),
        # The peak would be measured, which takes seconds.
        report=ReportConfig(eval_every=0, tensorboard=False, peak_tflops=1.0),
    )
    lora = replace(shared, lora=LoraConfig(rank=options.lora_rank))
    anew = KVCacheConfig(memory_gb=0)
    return {
        FULL: replace(shared, mode="full"),
        "PrefillShare, all weights": shared,
        "PrefillShare, all weights, the base's KV computed anew": replace(shared, kv_cache=anew),
        f"PrefillShare, all weights, tail {options.tail}": replace(shared, tail=options.tail),
        "PrefillShare, LoRA": lora,
        "PrefillShare, LoRA, the base's KV computed anew": replace(lora, kv_cache=anew),
    }


def _write_examples(options: TrainingOptions, folder: Path, words: int) -> str:
    """A file of as many examples as a run needs; the name of it."""
    example = {"prompt": _WORD * words, "completion": _WORD * options.completion_words}
    path = folder / f"{words}.jsonl"
    path.write_text((json.dumps(example) + "\n") * (options.batch_size * (1 + options.steps)))
    return str(path)


def table(result: dict[str, Any]) -> Table:
    """The seconds a step, and how they compare with full fine-tuning's.

    Args:
        result: of `run`.
    """
    options = result["options"]
    table = Table(title=f"{options['base']}: seconds a step of {options['batch_size']} examples")
    for header in ("prompt tokens", "", "median", "lowest", "highest", "of full"):
        table.add_column(header, justify="right" if header else "left")
    full = {row["prompt_tokens"]: row["median"] for row in result["steps"] if row["way"] == FULL}
    for row in result["steps"]:
        tokens = row["prompt_tokens"]
        table.add_row(
            str(tokens),
            row["way"],
            *(f"{row[key]:.3f}" for key in ("median", "low", "high")),
            f"{row['median'] / full[tokens]:.0%}",
        )
    return table
