"""What a run leaves: the decode module with its certificate and its training record."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
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
from pshare_jax.train.fine_tune import content_sha256
from pshare_jax.train.hooks import hook_sha256

RUN_FILE = "run.json"
RECORD_FILE = "training.json"
MODULE_FOLDER = "decode_module"
_PACKAGES = ("pshare_jax", "jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint", "numpy")
_CHANGEABLE = (
    "output",
    # What these name is compared by its content.
    "base",
    "data.train",
    "data.eval",
    "init",
    "distill.teacher",
    "distill.concurrency",
    "remat",
    "memory_check",
    "show",
    "kernel_backend",
    "compilation_cache_dir",
    "kv_cache",
    "mesh",
    "distributed",
    "checkpoint",
    "report",
)


def sources(config: TrainConfig) -> dict[str, str]:
    """Hashes (hex) of what decides a run's weights besides base and data: the teacher, what the
    weights start from, and code of the user's. A server is known by its model's name alone.

    Raises:
        ConfigError, CheckpointError: one of them cannot be read.
    """
    paths = {"init": config.init}
    if not config.distill.is_url:
        paths["teacher"] = config.distill.teacher
    hooks = {"loss": config.loss, "optimizer.factory": config.optimizer.factory}
    return {
        **{name: content_sha256(path) for name, path in paths.items() if path},
        **{name: hook_sha256(path, name) for name, path in hooks.items() if path},
    }


def open_run(
    config: TrainConfig, base: Manifest, train: Dataset, evaluation: Dataset | None, write: bool
) -> dict[str, Any]:
    """Starts or continues the run in `config.output`, and gives what identifies it.

    A run that is asked for more steps than it was planned for is continued: its decode module, if
    it has one, is set aside as `decode_module-STEPS`.

    Args:
        config: the run's.
        base: the prefill checkpoint.
        train: the training set.
        evaluation: the held-out set, if any.
        write: whether this process writes `run.json`.

    Raises:
        ConfigError: the folder holds a run with another configuration, base, teacher or data.
        CheckpointError: its `run.json` is damaged.
    """
    identity: dict[str, Any] = {
        "config": as_json(config),
        "base": base.fingerprint,
        "sources": sources(config),
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
    if not path.is_file():
        if write:
            replace_file(path, json.dumps(identity, indent=2) + "\n")
        return identity
    recorded = _recorded(path, base)
    extended = list(recorded.get("extended", []))
    if _check_resumable(config, recorded, identity):
        before = recorded["config"]["optimizer"]
        extended.append({name: before[name] for name in ("epochs", "max_steps")})
        if (record := config.folder / MODULE_FOLDER / RECORD_FILE).is_file():
            extended[-1]["steps"] = read_json(record)["steps"]
    if extended:
        identity["extended"] = extended
    if write:
        if extended:
            replace_file(path, json.dumps(identity, indent=2) + "\n")
        _set_aside(config)
    return identity


def _set_aside(config: TrainConfig) -> None:
    """Moves the decode module of a run that is being extended out of the way."""
    module = config.folder / MODULE_FOLDER
    if (record := module / RECORD_FILE).is_file():
        module.rename(config.folder / f"{MODULE_FOLDER}-{read_json(record)['steps']}")


def _recorded(path: Path, base: Manifest) -> dict[str, Any]:
    """What `open_run` or `write_module` wrote, with today's name of `base`.

    Raises:
        CheckpointError: the file is damaged.
    """
    record = read_json(path)
    return {**record, "base": base.current(str(record.get("base")))}


def finished_record(config: TrainConfig) -> dict[str, Any] | None:
    """The training record of a run that is done, or None; None too where more steps are asked for
    than it was planned for.

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
    now["sources"] = _sources_there(config, record)
    return None if _check_resumable(config, record, now) else record


def _sources_there(config: TrainConfig, record: Mapping[str, Any]) -> dict[str, str]:
    """As `sources`, without those of the same name that are gone: a finished run needs none."""
    before = record.get("config", {})
    named = {
        "init": (config.init, before.get("init")),
        "teacher": (config.distill.teacher, before.get("distill", {}).get("teacher")),
    }
    found = sources(config)
    for name, (path, recorded) in named.items():
        if path == recorded and not Path(path).expanduser().exists():
            found.pop(name, None)
    return found


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
        "packages": {name: _version(name) for name in _PACKAGES},
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


_LENGTH = ("optimizer.epochs", "optimizer.max_steps")


_version = functools.cache(importlib.metadata.version)


def _check_resumable(
    config: TrainConfig, recorded: Mapping[str, Any], now: Mapping[str, Any]
) -> bool:
    """Checks that a run may go on: what decides its weights must be as it was at its start.

    Where it is reported, saved, kept and computed may change, and it may become longer.

    Args:
        config: of now.
        recorded: of the start, `config` (see `as_json`) and other facts as JSON objects.
        now: the same of now.

    Returns:
        Whether it becomes longer.

    Raises:
        ConfigError: names the first key that differs.
    """
    before = _flat(recorded)
    known = {key.removeprefix("config."): value for key, value in before.items()}
    longer = _is_longer(known, config)
    for key, value in _flat(now).items():
        name = key.removeprefix("config.")
        if name != key and any(name == c or name.startswith(f"{c}.") for c in _CHANGEABLE):
            continue
        if name in _LENGTH and longer:
            continue
        if before.get(key) != value:
            if key.startswith("sources."):
                what = f"another {key.removeprefix('sources.')}: its content differs"
            else:
                what = f"{name} = {before.get(key)!r}, not {value!r}"
            raise ConfigError(
                f"output: {config.output} holds a run with {what}; choose another output, or "
                "remove that folder"
            )
    return longer


def _is_longer(before: Mapping[str, Any], config: TrainConfig) -> bool:
    """Whether `config` asks for more epochs or steps than `before` (flat keys), and not less."""
    if not all(name in before for name in _LENGTH):
        return False
    epochs, steps = config.optimizer.epochs, config.optimizer.max_steps or math.inf
    old_epochs, old_steps = before[_LENGTH[0]], before[_LENGTH[1]] or math.inf
    return (
        epochs >= old_epochs and steps >= old_steps and (epochs, steps) != (old_epochs, old_steps)
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
