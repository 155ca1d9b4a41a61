"""What a run leaves: the decode module with its certificate and its training record."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pshare_jax.convert.files import replace_file
from pshare_jax.convert.manifest import Manifest, read_json, read_manifest
from pshare_jax.convert.orbax import write_decode
from pshare_jax.convert.tensors import DTYPES
from pshare_jax.core.split_rule import SplitRule
from pshare_jax.errors import ConfigError
from pshare_jax.train.config import TrainConfig, as_json
from pshare_jax.train.data import Dataset, files_sha256

RUN_FILE = "run.json"
RECORD_FILE = "training.json"
MODULE_FOLDER = "decode_module"
_PACKAGES = ("pshare_jax", "jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint", "numpy")
_CHANGEABLE = (
    "output",
    # The base and the data are compared by their contents.
    "base",
    "data.train",
    "data.eval",
    "remat",
    "kernel_backend",
    "compilation_cache_dir",
    "kv_cache",
    "mesh",
    "distributed",
    "checkpoint",
    "report",
)


def open_run(
    config: TrainConfig, base: Manifest, train: Dataset, evaluation: Dataset | None, write: bool
) -> dict[str, Any]:
    """Starts or continues the run in `config.output`, and gives what identifies it.

    Args:
        config: the run's.
        base: the prefill checkpoint.
        train: the training set.
        evaluation: the held-out set, if any.
        write: whether this process writes `run.json`.

    Raises:
        ConfigError: the folder holds a run with another configuration, base or data.
        CheckpointError: its `run.json` is damaged.
    """
    identity = {
        "config": as_json(config),
        "base": base.fingerprint,
        "data": {
            "train_sha256": train.sha256,
            "train_examples": len(train.examples),
            "train_bad_lines": train.num_bad_lines,
            "eval_sha256": evaluation.sha256 if evaluation else None,
            "eval_examples": len(evaluation.examples) if evaluation else 0,
            "eval_bad_lines": evaluation.num_bad_lines if evaluation else 0,
        },
    }
    path = config.folder / RUN_FILE
    if path.is_file():
        _check_resumable(config, _recorded(path, base), identity)
    elif write:
        replace_file(path, json.dumps(identity, indent=2) + "\n")
    return identity


def _recorded(path: Path, base: Manifest) -> dict[str, Any]:
    """What `open_run` or `write_module` wrote, with today's name of `base`.

    Raises:
        CheckpointError: the file is damaged.
    """
    record = read_json(path)
    return {**record, "base": base.current(str(record.get("base")))}


def finished_record(config: TrainConfig) -> dict[str, Any] | None:
    """The training record of a run that is done, or None.

    Raises:
        ConfigError: that run had another configuration, base or data.
        CheckpointError: the record is damaged, or there is no base.
        DataError: a data file cannot be read.
    """
    path = config.folder / MODULE_FOLDER / RECORD_FILE
    if not path.is_file():
        return None
    base = read_manifest(config.base)
    record = _recorded(path, base)
    known = as_json(config)
    if config.dtype == "auto":
        # JAX need not be asked what that stands for.
        known["dtype"] = record.get("config", {}).get("dtype")
    hashes = {
        "train_sha256": files_sha256(config.data.train),
        "eval_sha256": files_sha256(config.data.eval) if config.data.eval else None,
    }
    now = {"config": known, "base": base.fingerprint, "data": hashes}
    _check_resumable(config, record, now)
    return record


def write_module(
    config: TrainConfig,
    base: Manifest,
    rule: SplitRule,
    weights: dict[str, np.ndarray],
    identity: dict[str, Any],
    results: dict[str, Any],
) -> dict[str, Any]:
    """Writes `decode_module/`, which is served as is; gives the training record in it.

    Args:
        config: the run's.
        base: the prefill checkpoint.
        rule: the split rule that the module was trained with.
        weights: the trained weights, float32; stored in the base's dtype.
        identity: see `open_run`.
        results: steps, losses and times.

    Raises:
        CheckpointError: it cannot be written; nothing is left.
    """
    record = {
        **identity,
        **results,
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    stored = {name: weight.astype(DTYPES[base.dtype]) for name, weight in weights.items()}
    is_lora = bool(config.lora.rank)
    write_decode(
        config.folder / MODULE_FOLDER,
        base,
        stored,
        tail=rule,
        cache_conditioned=config.mode != "full",
        source_config=None if is_lora else base.source_config,
        lora_rank=config.lora.rank if is_lora else None,
        lora_alpha=config.lora_alpha if is_lora else None,
        lora_targets=config.lora.targets if is_lora else None,
        extra_files={RECORD_FILE: (json.dumps(record, indent=2) + "\n").encode()},
    )
    return record


def _check_resumable(
    config: TrainConfig, recorded: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Checks that a run may go on: what decides its weights must be as it was at its start.

    Where it is reported, saved, kept and computed may change.

    Args:
        config: of now.
        recorded: of the start, `config` (see `as_json`) and other facts as JSON objects.
        now: the same of now.

    Raises:
        ConfigError: names the first key that differs.
    """
    before = _flat(recorded)
    for key, value in _flat(now).items():
        name = key.removeprefix("config.")
        if name != key and any(name == c or name.startswith(f"{c}.") for c in _CHANGEABLE):
            continue
        if before.get(key) != value:
            raise ConfigError(
                f"output: {config.output} holds a run with {name} = {before.get(key)!r}, not "
                f"{value!r}; choose another output, or remove that folder"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
